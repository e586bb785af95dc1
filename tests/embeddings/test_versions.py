"""The check of the torch / fbgemm / torchrec triple."""

from importlib.metadata import PackageNotFoundError

import pytest

from embeddings import versions

GOOD = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}


def install(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> None:
    def fake(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(versions, "version", fake)


@pytest.mark.parametrize(
    "packages",
    [GOOD, {"torch": "2.11.0+cu130", "fbgemm-gpu": "1.6.0", "torchrec": "1.6.1"}],
)
def test_matching_triples_pass(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> None:
    install(monkeypatch, packages)
    versions.check_triple()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fbgemm-gpu": "1.8.0"}, "overwrite each other"),
        ({"torchrec": "1.9.2"}, "needs fbgemm 1.8 and torchrec 1.8: found .*torchrec 1.9"),
        ({"torch": "2.12.1"}, "torch must be one of"),
        ({"fbgemm-gpu-cpu": "1.6.0"}, "fbgemm-gpu-cpu 1.6"),
        ({"torchrec": None}, "torchrec None"),
        ({"fbgemm-gpu-cpu": None}, "no fbgemm"),
    ],
)
def test_broken_triples_name_the_mend(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], message: str
) -> None:
    install(monkeypatch, {k: v for k, v in (GOOD | change).items() if v})
    with pytest.raises(ImportError, match=message) as caught:
        versions.check_triple()
    assert "make clean setup" in str(caught.value)
