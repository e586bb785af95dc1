"""A human look at a knowledge store: what it is, one prompt, and the nearest keys."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from llm_knowledge.errors import InputError
from llm_knowledge.store.neighbours import nearest
from llm_knowledge.store.reader import NO_CUTOFF, KnowledgeStore
from llm_knowledge.store.spread import spread_of


def inspect_store(
    path: str | Path, key: str | int | None = None, out: TextIO | None = None
) -> None:
    """Prints the manifest's summary, the prompt of a key and the five nearest keys by cosine.

    Vectors are read block by block, so a store of any size can be looked at.

    Args:
        path: the store; an incomplete one is shown as far as its manifest goes.
        key: key to show (digits count as an integer in an int64 store); None is the first row.
        out: where to print, by default standard output.

    Raises:
        InputError: no such store or key.
    """
    store = KnowledgeStore.open(path, allow_incomplete=True)
    say = lambda text="": print(text, file=out or sys.stdout)  # noqa: E731
    for line in _summary(store):
        say(line)
    if not len(store):
        return
    row = _find(store, key)
    text = store.read_text([row])[0]
    say(f"\nkey {_shown(store, row)}, row {row}, cut-off {_when(store, store.cutoffs()[row])}")
    say("prompt:")
    for line in (text["prompt"] or "").splitlines():
        say(f"  {line}")
    if text["answer"]:
        say(f"answer: {text['answer']}")
    (near,) = nearest(store, [row])
    say("\nnearest by cosine:")
    for (other, cosine), shown in zip(near, store.read_text([r for r, _ in near]), strict=True):
        first = " | ".join((shown["prompt"] or "").splitlines())
        say(f"  {cosine:+.3f}  {_shown(store, other)}  {first[:80]}")


def _summary(store: KnowledgeStore) -> Iterator[str]:
    m, cutoffs = store.manifest, store.cutoffs()
    dated = cutoffs[cutoffs != NO_CUTOFF]
    span = ""
    if len(dated):
        span = f", rows {_when(store, dated.min())} to {_when(store, dated.max())}"
    size = sum((store.path / part.file).stat().st_size for part in m.parts) / 2**20
    yield f"{store.path}: {m.level} knowledge, {'complete' if m.complete else 'INCOMPLETE'}"
    yield f"  rows        {m.rows} in {len(m.parts)} parts, {size:.1f} MiB, keys {m.key_type}"
    yield f"  model       {m.model.name} {m.model.revision or ''}({m.model.weights_hash[:19]}...)"
    yield (
        f"  vectors     dim {m.dim}, {m.dtype}, {m.pooling} pooling, layer {m.layer}, "
        f"{'length 1' if m.normalized else 'not normalized'}"
    )
    yield f"  template    {m.template.name} version {m.template.version} ({m.template.hash[:8]}...)"
    yield f"  cut-off     {m.cutoff.kind}{span}"
    if (spread := spread_of(store)) is not None:
        alike = ": hardly apart until they are centred, as training does" if spread.is_alike else ""
        yield (
            f"  spread      mean cosine of two rows {spread.mean_cosine:.3f}, effective rank "
            f"{spread.effective_rank:.0f}{alike}"
        )
    yield f"  fingerprint {store.fingerprint}"
    if m.note:
        yield f"  note        {m.note}"


def _shown(store: KnowledgeStore, row: int) -> str:
    return repr(store.keys()[row : row + 1].tolist()[0])


def _when(store: KnowledgeStore, cutoff: np.int64) -> str:
    """A cut-off for people: a date, or, of a log without a clock, a place in the user's own order."""
    if cutoff == NO_CUTOFF:
        return "none"
    if store.manifest.cutoff.unit == "order":
        return f"place {cutoff} in the user's order"
    return str(np.datetime64(int(cutoff), "s")).replace("T", " ")


def _find(store: KnowledgeStore, key: str | int | None) -> int:
    if key is None:
        return 0
    typed_key: str | int = str(key)
    if store.manifest.key_type == "int64":
        try:
            typed_key = int(key)
        except ValueError as error:
            raise InputError(f"{store.path}: keys are integers, got {key!r}") from error
    row = int(store.row_of([typed_key])[0])  # type: ignore[arg-type]
    if row < 0:
        raise InputError(f"{store.path}: has no key {key!r}; its first is {_shown(store, 0)}")
    return row
