import time

import pytest
import torch.distributed as dist

from llm_knowledge.encoding.encoder import Counters
from llm_knowledge.extraction import progress as module
from llm_knowledge.extraction.progress import Progress, lines
from llm_knowledge.extraction.workers import OneWorker, StoreWorkers


def pair():
    """Two workers that share a store in memory."""
    store = dist.HashStore()
    made = []
    for rank in range(2):
        own = StoreWorkers.__new__(StoreWorkers)
        own._store, own.rank, own.size = dist.PrefixStore("x", store), rank, 2
        made.append(own)
    return made


def share(**update):
    return {
        "texts": 30,
        "tokens": 3000,
        "reused": 600,
        "computed": 2500,
        "padding": 100,
        "seconds": 4,
        "rows": 30,
        "chunk": 0,
        "clock": 10.0,
        "at": time.time(),
        **update,
    }


def test_notes_are_those_of_all_who_left_one():
    one, two = pair()
    assert one.notes("user") == {}
    two.note("user", {"rows": 1})
    assert one.notes("user") == {1: {"rows": 1}}
    one.note("user", {"rows": 2})
    two.note("user", {"rows": 5})
    assert two.notes("user") == {0: {"rows": 2}, 1: {"rows": 5}}
    alone = OneWorker()
    assert alone.notes("user") == {}
    alone.note("user", {"rows": 3})
    assert alone.notes("user") == {0: {"rows": 3}}


def test_a_line_for_every_worker_and_one_for_all():
    shares = {1: share(chunk=12, at=time.time() - 1), 0: share(rows=60, tokens=9000, reused=0)}
    said = lines(shares, "user", left=180)
    assert said[0] == "worker 0: 60 users, 6.0 users/s, 900 tokens/s, padding 4%, reused 0%"
    assert said[1] == (
        "worker 1: 30 users, 3.0 users/s, 300 tokens/s, padding 4%, reused 20%; its "
        "chunk of 12 ends in about 3 s"
    )
    assert said[2] == (
        "all: 90 users, 9.0 users/s, 1,200 tokens/s, padding 4%, reused 5%; 180 to go, about 20 s"
    )
    assert lines({0: share(rows=0, tokens=0, reused=0, clock=0)}, "user", 9)[1].endswith(
        "reused 0%"
    )  # no rate


def test_only_what_was_added_at_this_level_counts(monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    one, two = pair()
    counters = Counters(texts=7, tokens=700, computed=700, seconds=1.0)
    mine = Progress(one, "item", 10, 2, counters, show=True)
    other = Progress(two, "item", 10, 2, Counters(), show=True)
    assert other.bar.disable
    counters.tokens += 50
    counters.computed += 40
    counters.padding += 10
    other.add(5)
    mine.add(3)
    mine.close()
    noted = one.notes("item/progress")
    assert (noted[0]["tokens"], noted[0]["padding"], noted[0]["rows"]) == (50, 10, 3)
    said = capsys.readouterr()
    assert "worker 0: 3 items" in said.err
    assert "worker 1: 5 items" in said.err
    assert "all: 8 items" in said.err
    assert "10/10" in said.err
    assert "padding 25%" in said.err


@pytest.mark.parametrize("show", [True, False])
def test_nothing_is_drawn_without_progress(show, capsys):
    progress = Progress(OneWorker(), "user", 4, 0, Counters(), show=show)
    progress.begin(4)
    progress.add(4)
    progress.close()
    said = capsys.readouterr()
    assert "worker 0" not in said.err
    assert ("user knowledge" in said.err) == show
    assert ("all: 4 users" in said.err) == show
