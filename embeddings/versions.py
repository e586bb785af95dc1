"""The torch / fbgemm / torchrec triple: which releases belong together, and what to say when they do not."""

from importlib.metadata import PackageNotFoundError, version

# The three are built against each other's binaries: one release of each fits exactly one of the others.
TRIPLES: dict[str, tuple[str, str]] = {
    # torch: (fbgemm-gpu or fbgemm-gpu-cpu, torchrec)
    "2.13": ("1.8", "1.8"),
    "2.11": ("1.6", "1.6"),
}


def _release(distribution: str) -> str | None:
    """Returns "major.minor" of an installed distribution, or None if it is not installed."""
    try:
        return ".".join(version(distribution).split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return None


def check_triple() -> None:
    """Checks that torch, fbgemm and torchrec belong together; cheap, imports none of them.

    Raises:
        ImportError: If one is missing, both fbgemm builds are installed over each other, or the
            releases do not match. The message names what is installed and the command that mends it.
    """
    torch_release, torchrec_release = _release("torch"), _release("torchrec")
    builds = {name: _release(name) for name in ("fbgemm-gpu", "fbgemm-gpu-cpu")}
    installed = {name: release for name, release in builds.items() if release}
    triple = f"found torch {torch_release}, torchrec {torchrec_release}, " + (
        ", ".join(f"{name} {release}" for name, release in installed.items()) or "no fbgemm"
    )
    mend = (
        "Mend it with: make clean setup   (or, in your own environment: "
        "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu torchrec && pip install -r requirements/PROFILE.txt "
        "&& pip install --no-deps -r requirements/no-deps.txt, PROFILE being cpu or cuda)"
    )
    if len(installed) > 1:
        raise ImportError(
            f"fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other: {triple}. {mend}"
        )
    if torch_release not in TRIPLES:
        raise ImportError(f"torch must be one of {', '.join(TRIPLES)}: {triple}. {mend}")
    fbgemm, torchrec = TRIPLES[torch_release]
    if list(installed.values()) != [fbgemm] or torchrec_release != torchrec:
        raise ImportError(
            f"torch {torch_release} needs fbgemm {fbgemm} and torchrec {torchrec}: {triple}. {mend}"
        )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of every package that shapes a result, for saving with outputs."""
    import platform

    names = [
        "torch",
        "torchrec",
        "fbgemm-gpu",
        "fbgemm-gpu-cpu",
        "transformers",
        "pyarrow",
        "duckdb",
    ]
    releases = {"python": platform.python_version(), "platform": platform.platform()}
    for name in [*names, "numpy", "pydantic", "torchx", "triton", "llm4msr"]:
        try:
            releases[name] = version(name)
        except PackageNotFoundError:
            continue
    return releases
