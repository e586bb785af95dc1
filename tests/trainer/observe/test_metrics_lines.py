"""A resumed run goes on behind the lines that it had, whatever became of them."""

import os
from pathlib import Path

import pytest

from llm_knowledge.errors import InputError
from trainer.observe.metrics_log import _reopen


def reopened(file: Path, step: int) -> bytes:
    with _reopen(file, step) as log:
        log.write('{"step": 9}\n')
    return file.read_bytes()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b'{"step": 1}\n{"step": 2}\n{"step": 3}\n', b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n{"step": 2, "lo', b'{"step": 1}\n'),  # a kill
        (b'{"step": 1}\n{"step": 2}', b'{"step": 1}\n{"step": 2}\n'),
        # Damaged lines: nothing that was written is thrown away.
        (b'{"step": 1, "loss": }\n{"step": 2}\n', b'{"step": 1, "loss": }\n{"step": 2}\n'),
        (b'{"step": "x"}\n[1]\n{}\n', b'{"step": "x"}\n[1]\n{}\n'),
        (b'{"step": 1, "name": "\xff"}\n', b'{"step": 1, "name": "\xff"}\n'),
    ],
)
def test_lines_up_to_the_step_are_kept(tmp_path: Path, before: bytes, after: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(before)
    assert reopened(tmp_path / "metrics.jsonl", 2) == after + b'{"step": 9}\n'


def test_a_file_that_is_not_there_begins(tmp_path: Path) -> None:
    assert reopened(tmp_path / "metrics.jsonl", 2) == b'{"step": 9}\n'


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics\.jsonl: is no regular file"):
        reopened(tmp_path / "metrics.jsonl", 2)
