"""Configurations, job files and command lines of any content: accepted or refused, never a traceback."""

from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.fuzz.damage import ODD, odd_value, unpack
from tests.fuzz.verdicts import run, untouched
from trainer.config.run import RunConfig

JOB: dict[str, Any] = {
    "scheduler": "local_cwd",
    "hosts": "1x2",
    "resource": {"cpu": 2, "memory_gib": 8},
    "image": "image:1",
    "restarts": 1,
    "retries": 0,
    "timeout_minutes": 30,
    "env": {"A": "b"},
    "mounts": [],
    "log_dir": "logs",
    "port": 29_400,
    "options": {"partition": "p", "time": "24:30:00"},
}
SCHEDULERS = ("slurm", "kubernetes", "jobset", "aws_batch", "local_docker", "nope", "", None)
SIZES = ("1:4x2", "2x8", "0x1", "x", "1x", "3:1x2", "512x8", "1x2x3", "１x２", " 1x2")
VALUES = ("1x2", "a=b", "cpu", "h100x8", "port=29500", "\n", "é", "partition=a\nb", "")
TEXTS = (
    *(
        "[" * 20_000,
        "",
        "a: b: c",
        "\t",
        "- 1",
        "null",
        "é",
        "{}",
        "'",
        "a: &a {b: *a}",
        "a: |\n  x\n y",
    ),
    *("!!python/name:os.x 1", "name: !!binary ////", "<<: 3", "2020-13-45", "0o7: 0x1F"),
)
WORDS = (
    *(
        "prepare",
        "parquet",
        "movielens",
        "train",
        "evaluate",
        "knowledge",
        "verify",
        "extract",
        "compress",
    ),
    *(
        "inspect",
        "report",
        "compare",
        "plan",
        "launch",
        "pipeline",
        "profile",
        "simulate",
        "--help",
        "--",
    ),
    *(
        "--config",
        "--out",
        "--set",
        "--raw",
        "--schema",
        "--data",
        "--level",
        "--dim",
        "--seed",
        "--key",
    ),
    *(
        "--processes",
        "--nodes",
        "--split",
        "--samples",
        "--split=x",
        "--cutoffs",
        "user",
        "valid",
        "made",
    ),
    *(
        "data",
        "runs/vocabulary",
        "knowledge/user",
        "configs/vocabulary.yaml",
        "99999999999999999999",
    ),
    *("0", "1", "3", "4", "-1", "1e9", "nan", "x", "", "é", "-", "@x"),
)
BEGINNINGS: tuple[list[str], ...] = (
    [],
    ["prepare", "parquet"],
    ["prepare", "--out", "made"],
    ["knowledge", "verify"],
    ["knowledge", "inspect", "knowledge/user"],
    ["evaluate", "runs/vocabulary"],
    ["compare", "runs/vocabulary"],
    ["report"],
    ["simulate", "--out", "made"],
    ["plan", "--config", "configs/vocabulary.yaml"],
    ["train", "--config"],
)


def config_case(draw: Random, folder: Path) -> str:
    """A run's configuration: `train` trains by it, or refuses it before anything is written."""
    unpack(folder)
    name = draw.choice(["vocabulary", "zero_collision"])
    file = folder / "configs" / f"{name}.yaml"
    content = yaml.safe_load(file.read_text())
    if draw.random() < 0.5:  # every field written out, so that every field may be changed
        content = RunConfig.model_validate(content).model_dump()
    content["output"] = "made"
    content["train"] |= {"epochs": 1, "eval_every": 30, "checkpoint_every": 30}
    if draw.random() < 0.1:
        content = draw.choice(TEXTS)
    else:
        for _ in range(draw.choice([1, 1, 2])):
            content = odd_value(draw, content)
    train = content.get("train") if isinstance(content, dict) else None
    epochs = train.get("epochs") if isinstance(train, dict) else None
    if isinstance(epochs, int | float) and epochs > 3:
        return "left out: would train for long"
    text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
    file.write_text(text, encoding="utf-8")
    words = ["train", "--config", str(file)]
    if draw.random() < 0.3:
        fields = [field for field in _paths(RunConfig) if field != "train.epochs"]
        words += ["--set", f"{draw.choice(fields)}={draw.choice(ODD)}".replace("\0", "\\0")]
    with untouched(folder / "data", folder / "knowledge", folder / "runs"):
        ended = run(*words)
    return "trained" if ended.code == 0 else "refused"


def _paths(model: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields."""
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        if hasattr(field.annotation, "model_fields"):
            found += _paths(field.annotation, f"{prefix}{name}.")
    return found


def job_case(draw: Random, folder: Path) -> str:
    """A job file: what would be submitted is shown, or it is refused."""
    unpack(folder)
    job = dict(JOB)
    scheduler = draw.choice(SCHEDULERS)
    if scheduler in ("slurm", "local_cwd"):
        del job["image"]
    if scheduler != "slurm":
        job["options"] = {"queue": "q"} if scheduler in ("kubernetes", "aws_batch") else {}
    job["scheduler"] = scheduler
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        changed = odd_value(draw, job)
        job = changed if isinstance(changed, dict) else job
    if draw.random() < 0.3:
        job["hosts"] = draw.choice(SIZES)
    file = folder / "job.yaml"
    text = draw.choice(TEXTS) if draw.random() < 0.08 else yaml.safe_dump(job, allow_unicode=True)
    file.write_text(text, encoding="utf-8")
    stage = draw.choice(["train", "train", "evaluate", "extract", "pipeline"])
    words = ["launch", stage, "--job", str(file), "--dryrun"]
    if draw.random() < 0.3:
        option = draw.choice(["-j", "--cfg", "--resource", "--image", "--scheduler", "--set"])
        words += [option, draw.choice(VALUES)]
    arguments = {"evaluate": ["runs/vocabulary"]}.get(
        stage, ["--config", "configs/vocabulary.yaml"]
    )
    words += ["--", *draw.choice([arguments, arguments, arguments, ["x"], []])]
    with untouched(folder / "data", folder / "knowledge", folder / "runs", folder / "configs"):
        ended = run(*words)
    return f"{'shown' if ended.code == 0 else 'refused'}: {scheduler}"


def words_case(draw: Random, folder: Path) -> str:
    """A command line of words in any order: usage or a message, and nothing that was there is changed."""
    unpack(folder)
    words = [*draw.choice(BEGINNINGS), *draw.choices(WORDS, k=draw.randrange(6))]
    if words and words[0] in ("train", "extract", "simulate", "profile", "launch", "pipeline"):
        words = [word for word in words if word not in ("--processes", "99999999999999999999")]
    with untouched(folder / "data", folder / "knowledge", folder / "configs"):
        ended = run(*words)
    return "done" if ended.code == 0 else "refused"
