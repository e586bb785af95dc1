"""JSON files that were damaged are refused with one message, whatever lies there."""

import os
from pathlib import Path

import pytest

from llm_knowledge.errors import InputError
from llm_knowledge.json_files import read_json

FIELDS = {"step": int, "name": str}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as JSON"),
        ("[" * 100_000, r"cannot be read as JSON \(nested too deeply\)"),
        ('{"step": 1', "cannot be read as JSON"),
        ("[]", "is list, must be an object"),
        ("null", "is NoneType, must be an object"),
        ('{"name": "x"}', "field 'step' is missing"),
        ('{"step": "1", "name": "x"}', "field 'step' is '1'"),
        ('{"step": true, "name": "x"}', "field 'step' is True"),
        ('{"step": 1, "name": null}', "field 'name' is None"),
    ],
)
def test_what_it_is_not(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "state.json"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"state\.json: {words}.*; train again"):
        read_json(file, FIELDS, "train again")


def test_what_lies_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "latin").write_bytes(b'{"name": "\xe9"}')
    for name in ("folder", "pipe", "zeros"):
        with pytest.raises(InputError, match=f"{name}: is no regular file"):
            read_json(tmp_path / name, FIELDS, "train again")
    for name in ("link", "absent"):
        with pytest.raises(InputError, match=f"{name}: is missing"):
            read_json(tmp_path / name, FIELDS, "train again")
    with pytest.raises(InputError, match="latin: cannot be read as JSON"):
        read_json(tmp_path / "latin", FIELDS, "train again")


def test_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text('{"step": 1, "name": "é", "more": []}', encoding="utf-8")
    assert read_json(file, FIELDS, "") == {"step": 1, "name": "é", "more": []}
