"""Runs the fuzzer: python -m tests.fuzz --cases 20000 --seed 0."""

import argparse
import sys
import time
from collections import Counter

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import run_cases


def main() -> int:
    """Prints seeds, counts per verdict and what was broken; 1 if anything was."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    parser.add_argument("--only", choices=sorted(KINDS), help="this kind alone")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()
    kinds = {options.only: KINDS[options.only]} if options.only else KINDS
    shares = sum(kind.share for kind in kinds.values())
    broken = False
    for name, kind in kinds.items():
        count = max(round(options.cases * kind.share / shares), 1)
        numbers = range(options.first, options.first + count)
        began = time.monotonic()
        print(
            f"{name}: seed {options.seed}, cases {numbers.start} to {numbers.stop - 1}", flush=True
        )
        report = run_cases(
            name,
            kind.case,
            options.seed,
            numbers,
            options.workers,
            tell=lambda number, problem: print(f"  BROKEN case {number}: {problem}", flush=True),
        )
        print(f"  {time.monotonic() - began:.0f} s")
        for verdict, times in sorted(report.verdicts.items()):
            print(f"  {times:6d}  {verdict}")
        reasons = Counter(problem.partition(":")[0] for _, problem in report.broken)
        print(f"  {len(report.broken)} broken {dict(reasons) if reasons else ''}", flush=True)
        broken = broken or bool(report.broken)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
