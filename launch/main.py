"""The command line. Nothing heavy is imported until a command needs it, so that help is instant."""

import errno
import logging
import os
import sys

from launch.logs import set_up_logging
from launch.parser import build_parser
from launch.workers import INPUT_WAS_WRONG
from llm_knowledge.errors import InputError

DONE, INTERRUPTED, NOBODY_READS = 0, 130, 141
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# What the system says of a connection or another process is a fault of ours, not of a file.
NOT_OF_FILES = (
    ConnectionError,
    ChildProcessError,
    ProcessLookupError,
    InterruptedError,
    TimeoutError,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done and complete; 2 the input was wrong (one message, no traceback); 130 interrupted; 141
        nobody reads the output; 1 a fault of ours.
    """
    words = sys.argv[1:] if arguments is None else arguments
    when_interrupted = ""
    try:
        _check_encoding(words)
        # What follows -- belongs to the stage that `launch` submits.
        end = words.index("--") if "--" in words else len(words)
        options = build_parser().parse_args(words[:end])
        options.arguments = words[end + 1 :]
        when_interrupted = options.when_interrupted
        set_up_logging(options.log_level)
        check_processes(getattr(options, "processes", 1))
        return options.run(options, words) or DONE
    except InputError as error:
        # Ranks agree on bad input before they raise it: one of them speaks for all.
        if _is_first_rank() or not error.shared:
            _say(f"error: {error}")
        return INPUT_WAS_WRONG
    except UnicodeEncodeError as error:
        if error.encoding.lower().replace("-", "") == "utf8":
            raise
        _say(
            f"error: {error.object!r}: cannot be written in this system's encoding {error.encoding}; "
            "set PYTHONUTF8=1, or a locale like C.UTF-8"
        )
        return INPUT_WAS_WRONG
    except BrokenPipeError:  # whoever read the output has seen enough, e.g. `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except OSError as error:
        if isinstance(error, NOT_OF_FILES) or error.errno is None:
            raise
        logging.getLogger("launch").debug("where it happened:", exc_info=True)
        advice = "; make room or choose another place" if error.errno in NO_ROOM else ""
        _say(f"error: {error.filename or 'a file of this command'}: {error.strerror}{advice}")
        return INPUT_WAS_WRONG
    except (MemoryError, RuntimeError, ValueError) as error:
        if not _is_out_of_memory(error):
            raise
        logging.getLogger("launch").debug("where it happened:", exc_info=True)
        reason = " ".join(str(error).split())[-200:]
        _say(
            f"error: out of memory ({reason}); lower train.global_batch_size, use more hosts, or smaller "
            "tables; what was saved is whole"
        )
        return INPUT_WAS_WRONG
    except KeyboardInterrupt:
        if _is_first_rank():
            _say(f"interrupted; {when_interrupted}" if when_interrupted else "interrupted")
        return INTERRUPTED


def check_processes(processes: int) -> None:
    """Checks how many ranks a command is to start, which it cannot where a launcher has started it.

    Raises:
        InputError: Fewer than one, or another number than the launcher's.
    """
    if processes < 1:
        raise InputError(f"--processes {processes}: at least 1 is needed")
    world = os.environ.get("WORLD_SIZE")
    if "RANK" in os.environ and world is not None and processes not in (1, int(world)):
        raise InputError(
            f"--processes {processes}: a launcher has started this command as one of {world} ranks; leave "
            "--processes out, and tell the launcher",
            shared=True,
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether no machine, or not this one, has the memory that is asked for: libraries have many words."""
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in words
        or "CUDA out of memory" in words
        or "array is too big" in words  # of NumPy, beyond any address
    )


def _check_encoding(words: list[str]) -> None:
    """Refuses what Python could not decode: paths would mean one thing to it, another to libraries."""
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{word.encode('utf-8', 'backslashreplace').decode()}: is not text in this locale; set "
                "LC_ALL=C.UTF-8, or rename what it names"
            ) from None


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    print(f"llm4msr: {text}", file=sys.stderr)
