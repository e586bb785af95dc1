"""The command line. Nothing heavy is imported until a command needs it, so that help is instant."""

import errno
import os
import sys

from launch.logs import set_up_logging
from launch.parser import build_parser
from launch.workers import INPUT_WAS_WRONG
from llm_knowledge.errors import InputError

DONE, INTERRUPTED = 0, 130


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done and complete; 2 the input was wrong (one message, no traceback); 1 a fault of ours.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        for word in words:
            if any("\ud800" <= character <= "\udfff" for character in word):
                raise InputError(
                    f"{word!r}: is not text in this locale; set LC_ALL=C.UTF-8, or rename what it names"
                )
        # What follows -- belongs to the stage that `launch` submits.
        end = words.index("--") if "--" in words else len(words)
        options = build_parser().parse_args(words[:end])
        options.arguments = words[end + 1 :]
        set_up_logging(options.log_level)
        if getattr(options, "processes", 1) < 1:
            raise InputError(f"--processes {options.processes}: at least 1 is needed")
        return options.run(options, words) or DONE
    except InputError as error:
        # Ranks agree on bad input before they raise it: one of them speaks for all.
        if os.environ.get("RANK", "0") == "0" or not error.shared:
            print(f"llm4msr: error: {error}", file=sys.stderr)
        return INPUT_WAS_WRONG
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        file = error.filename or "a file of this command"
        print(
            f"llm4msr: error: {file}: {error.strerror}; make room or choose another place",
            file=sys.stderr,
        )
        return INPUT_WAS_WRONG
    except KeyboardInterrupt:
        print("llm4msr: interrupted; the same command continues where it can", file=sys.stderr)
        return INTERRUPTED
