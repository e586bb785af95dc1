"""A minute of the fuzzer; hours of it: python -m tests.fuzz --cases 20000 --seed 0."""

import os
import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import random_numbers, run_cases
from tests.fuzz.verdicts import Broken

CASES = {"prepare": 120, "store": 40, "job": 30, "words": 12, "config": 8, "dataset": 8, "run": 10}
SEED = 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_ends_as_promised(kind: str) -> None:
    report = run_cases(kind, KINDS[kind].case, SEED, range(CASES[kind]))
    print(f"seed {SEED}: {dict(report.verdicts)}")
    assert report.broken == []
    assert sum(report.verdicts.values()) == CASES[kind]
    assert report.verdicts["faulty"] == 0


def test_a_case_that_hangs_or_dies_is_named_and_the_others_go_on() -> None:
    numbers = {random_numbers("own", 0, number).random(): number for number in range(9)}

    def case(draw: Random, folder: Path) -> str:
        number = numbers[draw.random()]
        if number == 2:
            time.sleep(60)
        if number == 4:
            os._exit(3)
        if number == 5:
            raise Broken("a promise")
        if number == 7:
            raise KeyError("of the case")
        return "fine"

    report = run_cases("own", case, 0, range(9), workers=2, patience=1.0)
    assert [number for number, _ in report.broken] == [2, 4, 5, 7]
    assert [problem for _, problem in report.broken][:3] == ["hung", "died: 3", "a promise"]
    assert report.verdicts == {"fine": 5, "hung": 1, "died": 1, "broken": 1, "faulty": 1}
