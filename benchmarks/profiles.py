"""Profiles and prompts of many simulated users: users per second, and memory over time.

Each size runs in a process of its own, so that its peak of resident memory is its own. The model is left
out: what is measured is everything that stands before it. Tokens are counted by the tokenizer of the
packaged encoder, the default of `knowledge extract`.

Example: python -m benchmarks.profiles --sizes 250000 1000000 --out benchmarks/results/profiles.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVENTS_PER_USER, ITEMS, SCENARIOS = 10, 20_000, 4
BATCH, SAMPLE_SECONDS = 4_096, 0.5


def resident_mib() -> float:
    """Resident memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(data: Path, memory_limit: str, threads: int, prompts: bool) -> dict[str, Any]:
    """Run profiles and prompts of one dataset; seconds, rows, and resident memory while it runs."""
    from transformers import AutoTokenizer

    from llm_knowledge.encoding.encoder import find_model
    from llm_knowledge.profiles.dataset import Dataset, ProfileOptions, profile_batches
    from llm_knowledge.prompts import Renderer, load_template

    tokenizer = AutoTokenizer.from_pretrained(find_model(None, None)[0])
    dataset = Dataset.open(data)

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts))["input_ids"]]

    template = load_template("user_plain", "user")
    names = dataset.positive_name, dataset.negative_name
    renderer = Renderer(template, dataset.scenarios, *names, count, max_tokens=256)
    list(renderer.render([{"items": []}]))  # loads what is loaded once
    base, samples, done = resident_mib(), [], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples.append(resident_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    options = ProfileOptions(memory_limit=memory_limit, threads=threads)
    start, first, users, characters = time.perf_counter(), None, 0, 0
    with tempfile.TemporaryDirectory(dir=data.parent) as scratch:
        for batch in profile_batches(dataset, "user", options, BATCH, Path(scratch)):
            first = first or time.perf_counter() - start
            users += len(batch)
            if prompts:
                rows = map(json.loads, batch["data"].to_pylist())
                characters += sum(map(len, renderer.render(rows)))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    # Peaks of ten equal stretches of time: flat means constant.
    stretch = max(1, len(samples) // 10)
    peaks = [round(max(samples[i : i + stretch])) for i in range(0, len(samples), stretch)]
    return {
        "users": users,
        "profile_events": dataset.raw["rows"]["profile"],
        "prompts": prompts,
        "seconds": round(seconds, 1),
        "seconds_to_first_batch": round(first or 0, 1),
        "users_per_second": round(users / seconds),
        "characters_per_prompt": round(characters / users) if prompts else None,
        "resident_before_mib": round(base),
        "resident_peak_mib": round(max(samples, default=base)),
        "peaks_over_time_mib": peaks,
    }


def main() -> None:
    """Simulates the logs that are not there, measures each size in its own process, writes JSON."""
    options = _parser().parse_args()
    if options.measure:
        prompts = not options.without_prompts
        result = measure(options.measure, options.memory_limit, options.threads, prompts)
        print(json.dumps(result))
        return
    runs = []
    for users in options.sizes:
        data = options.folder / f"users-{users}"
        if not data.exists():
            from trainer.data.sources.simulate import simulate

            # More users than asked for are drawn, since some have no event in the profile window.
            simulate(data, users, ITEMS, SCENARIOS, users * EVENTS_PER_USER, seed=0)
        for extra in (["--without-prompts"], []):
            command = [sys.executable, "-m", "benchmarks.profiles", "--measure", str(data), *extra]
            command += ["--memory-limit", options.memory_limit, "--threads", str(options.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout))
            print(runs[-1], flush=True)
    import duckdb

    about = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "duckdb": duckdb.__version__,
        "memory_limit": options.memory_limit,
        "threads": options.threads,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[250_000, 1_000_000],
        help="users drawn; nine in ten have a profile",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("data/simulated-users"), help="for the logs"
    )
    parser.add_argument("--memory-limit", default="1GB", help="of DuckDB")
    parser.add_argument("--threads", type=int, default=2, help="of DuckDB")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profiles.json"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--without-prompts", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
