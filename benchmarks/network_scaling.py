"""Training steps over hosts whose network is limited, against what the formulas predict.

    python -m benchmarks.network_scaling --out benchmarks/results/network_scaling.json

Hosts are network namespaces of this machine, made by `launch/local_cluster.sh`, which needs root. Ranks take
the trainer's own steps on a simulated log: wide tables and a small dense part, so that the network and
not the few cores decides. Weak scaling keeps the samples per rank, strong scaling their sum.

Predicted seconds of a step: the step of a single rank with as many samples, measured in the same round, times
the ranks that share a core; plus the bytes that a host sends, by `embeddings/planning/traffic.py` and with
the headers of full packets, divided by the link's rate. Nothing is taken to overlap. A second prediction
takes the seconds of a bare exchange of the same bytes, measured after the steps, for the link's part.
"""

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from embeddings.planning.traffic import all_reduce, by_link, plan_traffic
from embeddings.profiling.measure import machine
from trainer.config.run import load_config
from trainer.data.sources.simulate import simulate
from trainer.distributed.process_group import distributed
from trainer.run.build import build
from trainer.run.inputs import open_inputs

SCRIPT = Path(__file__).parent.parent / "launch/local_cluster.sh"
NAMESPACES = "scaling"
HOSTS = 4
LAYOUTS = ((2, 1), (2, 2), (4, 1))  # hosts, ranks on each
WIRE = 1514 / 1448  # bytes on the wire per byte of payload: Ethernet, IP and TCP with time stamps
CLONE_NEWNET = 0x40000000
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Arm:
    """One measurement: `mbit` None is a single rank, which sends nothing."""

    mbit: int | None
    hosts: int
    ranks_per_host: int
    batch: int

    @property
    def ranks(self) -> int:
        """Ranks of all hosts."""
        return self.hosts * self.ranks_per_host


@dataclass(frozen=True)
class Options:
    """What is measured: samples per rank of weak scaling, width of tables, steps, rounds, rates."""

    batch: int
    dim: int
    steps: int
    warmup: int
    rounds: int
    mbit: tuple[int, ...]

    def arms(self) -> list[Arm]:
        """Single ranks of every size, then all layouts; strong scaling divides twice `batch`."""
        whole = 2 * self.batch
        found = [Arm(None, 1, 1, size) for size in (self.batch // 2, self.batch, whole)]
        for mbit, (hosts, local) in itertools.product(self.mbit, LAYOUTS):
            sizes = {self.batch, whole // (hosts * local)}
            found += [Arm(mbit, hosts, local, size) for size in sorted(sizes)]
        return found


def cluster(*words: str) -> None:
    """Makes or removes the namespaces; where that is not possible, ends with the script's exit code 3."""
    environment = os.environ | {"LLM4MSR_NAMESPACES": NAMESPACES}
    done = subprocess.run([SCRIPT, "namespaces", *words], env=environment, stdout=2)
    if done.returncode:
        raise SystemExit(done.returncode)


def enter_host(host: int) -> None:
    """Moves this process into a host's network."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{NAMESPACES}{host + 1}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def sent_bytes() -> int:
    """Bytes that this host has sent to others so far, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if "eth0:" in line).split(":")[1].split()[8])


def bare_exchange(bytes_between: np.ndarray, repeats: int) -> float:
    """Seconds that two all-to-alls take which together send what a step sends, and nothing else."""
    rank = dist.get_rank()
    given, taken = (
        (part / 8).astype(int).tolist() for part in (bytes_between[rank], bytes_between[:, rank])
    )
    source, target = torch.zeros(sum(given)), torch.zeros(sum(taken))
    dist.all_to_all_single(target, source, taken, given)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(2 * repeats):
        dist.all_to_all_single(target, source, taken, given)
    dist.barrier()
    return (time.perf_counter() - began) / repeats


def rank_main(rank: int, arm: Arm, options: Options, root: Path, folder: Path) -> None:
    """Trains; rank 0 writes seconds per step, bytes per host and step: counted and predicted."""
    torch.set_num_threads(1)
    enter_host(rank // arm.ranks_per_host)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(arm.ranks)}
    os.environ |= {"LOCAL_RANK": str(rank % arm.ranks_per_host)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(arm.ranks_per_host)}
    store = dist.FileStore(str(folder / "rendezvous"), arm.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=arm.ranks, timeout=TIMEOUT)
    values = {
        "name": "network",
        "output": folder,
        "data.path": root / "data",
        "tables.dim": options.dim,
        "model.backbone": "shared_bottom",
        "model.hidden": [8],
        "train.global_batch_size": arm.batch * arm.ranks,
    }
    config = load_config(None, [f"{key}={value}" for key, value in values.items()])
    with distributed(60) as runtime:
        run = build(config, runtime, folder, open_inputs(config, runtime))
        run.model.train()
        kept = options.warmup + options.steps
        batches = list(itertools.islice(run.stream(["train"], shuffle=True).batches(), kept))
        lengths = torch.tensor([b.ids["history"].lengths().float().mean() for b in batches]).mean()
        dist.all_reduce(lengths)
        feed = itertools.cycle(batches)  # the pipeline reads ahead
        for _ in range(options.warmup):
            run.pipeline.progress(feed)
        dist.barrier()
        sent, began = sent_bytes(), time.perf_counter()
        for _ in range(options.steps):
            run.pipeline.progress(feed)
        dist.barrier()
        seconds = (time.perf_counter() - began) / options.steps
        own = (
            (sent_bytes() - sent) / options.steps if runtime.rank % arm.ranks_per_host == 0 else 0.0
        )
        counted = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(counted)
        history = float(lengths) / arm.ranks
        tables = [
            replace(one, ids_per_sample=(1, history)) if one.sequence else one
            for one in run.model.module.tables
        ]
        dense = sum(parameter.numel() for parameter in run.model.module.dense.parameters())
        traffic = plan_traffic(tables, run.tables, arm.batch, arm.ranks, arm.hosts).total
        traffic = traffic + all_reduce(4 * dense, arm.ranks)
        _, between = by_link(traffic, arm.hosts)
        bare = bare_exchange(traffic, options.steps // 2) if arm.ranks > 1 else 0.0
        if runtime.is_main:
            found = {
                "seconds": seconds,
                "bare_seconds": bare,
                "formula_bytes": between / arm.hosts * WIRE,
                "counted_bytes": float(counted) / arm.hosts,
                "history": history,
                "dense_parameters": dense,
            }
            (folder / "found.json").write_text(json.dumps(found))


def measure(arm: Arm, options: Options, root: Path) -> dict[str, Any]:
    """Forks the ranks of one arm."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        context = multiprocessing.get_context("fork")
        words = (arm, options, root, Path(folder))
        ranks = [
            context.Process(target=rank_main, args=(rank, *words)) for rank in range(arm.ranks)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + 180
        for process in ranks:
            process.join(max(end - time.monotonic(), 0))
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        for process in ranks:
            process.kill()
        if failed:
            raise SystemExit(f"{arm}: ranks {failed} failed")
        return json.loads((Path(folder) / "found.json").read_text())


def measure_all(options: Options, root: Path) -> list[dict[str, Any]]:
    """All arms in every round, in another order each time but for the rates."""
    simulate(root / "data", users=2000, items=5000, scenarios=4, events=60_000)
    arms, found = options.arms(), []
    runs: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for number in range(options.rounds):
        generator = random.Random(number)
        for mbit in generator.sample(options.mbit, len(options.mbit)):
            cluster("up", str(mbit), str(HOSTS))
            first = mbit == options.mbit[0]  # single ranks send nothing: once per round
            chosen = [arm for arm in arms if arm.mbit == mbit or (arm.mbit is None and first)]
            for arm in generator.sample(chosen, len(chosen)):
                runs[arm].append(measure(arm, options, root))
                print(number, arm, runs[arm][-1], flush=True)
    found = [asdict(arm) | {"runs": of_arm} for arm, of_arm in runs.items()]
    return found


# ---------------------------------------------------------------- the table


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every arm with its prediction, round by round."""
    cores = result["machine"]["cores"]
    alone = {arm["batch"]: arm["runs"] for arm in result["arms"] if arm["mbit"] is None}
    rows = []
    for arm in result["arms"]:
        if arm["mbit"] is None:
            continue
        ranks = arm["hosts"] * arm["ranks_per_host"]
        samples, rate = ranks * arm["batch"], arm["mbit"] * 1e6 / 8
        measured, ratios, by_bare, shares = [], [], [], []
        for one, single in zip(arm["runs"], alone[arm["batch"]], strict=True):
            compute = single["seconds"] * max(1, ranks / cores)
            measured.append(samples / one["seconds"])
            ratios.append((compute + one["formula_bytes"] / rate) / one["seconds"])
            by_bare.append((compute + one["bare_seconds"]) / one["seconds"])
            shares.append(measured[-1] / (ranks * arm["batch"] / single["seconds"]))
        rows.append(
            arm
            | {"ranks": ranks, "measured": measured, "ratios": ratios, "by_bare": by_bare}
            | {"shares": shares}
        )
    return rows


def _spread(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def format_result(result: dict[str, Any]) -> str:
    """Measured against predicted samples per second: medians and extremes of the rounds."""
    batch, rows = result["options"]["batch"], _rows(result)
    head = ["scaling", "Mbit/s", "hosts x ranks", "samples per rank", "samples/s", "predicted"]
    head += ["measured / predicted", "of so many single ranks", "MB per host and step: formula"]
    head += ["counted", "measured / predicted from a bare exchange"]
    lines = [head, ["---"] * len(head)]
    for kind in ("weak", "strong"):
        for row in rows:
            if row["batch"] != (batch if kind == "weak" else 2 * batch // row["ranks"]):
                continue
            measured = statistics.median(row["measured"])
            ratio = statistics.median(row["ratios"])
            sizes = [
                f"{statistics.median(one[name] for one in row['runs']) / 1e6:.2f}"
                for name in ("formula_bytes", "counted_bytes")
            ]
            lines.append(
                [
                    kind,
                    str(row["mbit"]),
                    f"{row['hosts']} x {row['ranks_per_host']}",
                    str(row["batch"]),
                    _spread(row["measured"], ",.0f"),
                    f"{measured / ratio:,.0f}",
                    _spread(row["ratios"], ".2f"),
                    f"{statistics.median(row['shares']):.0%}",
                    *sizes,
                    _spread(row["by_bare"], ".2f"),
                ]
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=512, help="samples per rank (default: 512)")
    parser.add_argument("--dim", type=int, default=256, help="width of tables (default: 256)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run (default: 6)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of everything (default: 3)")
    parser.add_argument("--mbit", type=int, nargs="+", default=[100, 400], help="rates of links")
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("out")
    options = Options(**given | {"mbit": tuple(given["mbit"])})
    torch.set_num_threads(1)
    before = machine()
    try:
        with tempfile.TemporaryDirectory() as root:
            arms = measure_all(options, Path(root))
    finally:
        cluster("down")
    result = {"machine": before, "options": asdict(options), "arms": arms}
    result["load_after"] = os.getloadavg()[0]
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(format_result(result))


if __name__ == "__main__":
    main()
