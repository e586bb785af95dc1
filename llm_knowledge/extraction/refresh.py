"""A store for a log that went on: only prompts that changed are read by the model again.

The old store stays as it is; the new one appears beside it, whole. People who asked to be forgotten
are left out, also of compressed children. Remove them from the log as well, or the next refresh
meets them again, and delete the old directories: nothing here deletes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import MODEL_FIELDS
from llm_knowledge.files import workspace

if TYPE_CHECKING:
    import pyarrow as pa

    from llm_knowledge.extraction.config import ExtractConfig
    from llm_knowledge.extraction.job import Job
    from llm_knowledge.store.manifest import Manifest, Part
    from llm_knowledge.store.reader import KnowledgeStore

# Changed prompts wait for each other until a batch is worth while, and so do the parts they are of.
WAITING_PROMPTS, WAITING_ROWS = 1024, 32_768


@dataclass
class Refreshed:
    """What a refresh did: numbers of rows, and the new manifest."""

    kept: int = 0
    changed: int = 0
    added: int = 0
    removed: int = 0
    gone: int = 0  # in the old store, no longer in the data
    manifest: Manifest | None = None

    def __str__(self) -> str:
        return (
            f"{self.kept:,} kept, {self.changed:,} changed, {self.added:,} new, {self.removed:,} "
            f"removed on request, {self.gone:,} no longer in the data"
        )


@dataclass
class _Chunk:
    """The rows of one part on their way: which vectors are old, which prompts are to be read."""

    keys: list[Any]
    cutoffs: list[int | None]
    prompts: list[str]
    answers: list[str | None]
    old_rows: np.ndarray  # int64 [rows], row in the old store whose vector is kept, or -1
    new: list[int] = field(default_factory=list)


def main(options: argparse.Namespace) -> int:
    """Runs from parsed options, prints what changed, and returns 0.

    Raises:
        InputError: see `refresh`.
    """
    remove = list(options.remove)
    if options.remove_file:
        try:
            lines = options.remove_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--remove-file {options.remove_file}: cannot be read ({error})"
            ) from error
        remove += [line.strip() for line in lines if line.strip()]
    dated = {} if options.cutoff is None else {"cutoff": options.cutoff}
    done = refresh(
        options.store,
        options.data,
        options.out,
        remove,
        options.child,
        **{name: getattr(options, name) for name in ("template", *MODEL_FIELDS)},
        **dated,
    )
    print(f"{options.out}: {done}")
    if remove:
        old = [str(options.store), *(str(child) for child, _ in options.child)]
        print(f"the removed keys are still in {', '.join(old)}: delete these directories")
    return 0


def refresh(
    store: str | Path,
    data: str | Path,
    out: str | Path,
    remove: Sequence[int | str] = (),
    children: Sequence[tuple[str | Path, str | Path]] = (),
    **options: Any,
) -> Refreshed:
    """Writes the store that a full extraction from `data` would write, encoding only what changed.

    A row is kept if its prompt is the same, and encoded if not; its cut-off is that of `data`.
    Memory holds some thousand rows and the keys. Nothing appears unless all of it is done; what a
    refresh that was killed had done lies hidden beside `out`, and the same call continues it.

    Args:
        store: complete store of `extract`; it is only read.
        data: prepared dataset directory, as it is now.
        out: new directory of the refreshed store.
        remove: keys to leave out, though they may be in `data`.
        children: (compressed store, new directory): compressed again from the refreshed store, by
            the same projection, so that removed keys are gone there too.
        options: fields of `ExtractConfig` that name the model again: model, template,
            trust_remote_code, device, batch_tokens, memory_limit, prefix_reuse; and cutoff, for a
            dated successor.

    Raises:
        InputError: the store is incomplete or compressed, was made by another model or template, a
            key to remove is neither in the store nor in the data, or a directory is not new.
    """
    from llm_knowledge.extraction.job import Job
    from llm_knowledge.extraction.workers import OneWorker
    from llm_knowledge.store.compress import recompress
    from llm_knowledge.store.reader import KnowledgeStore, verify
    from llm_knowledge.store.writer import resumed_directory, write_manifest

    old = KnowledgeStore.open(store)
    _refuse(old, children)
    config, encoder = _same_model(old.manifest, Path(data), Path(out), options)
    job = Job(config, encoder, OneWorker())
    manifest = _refuse_other(old, job._manifest())
    manifest = manifest.model_copy(update={"parents": [old.fingerprint]})
    forget = _keys(old, remove)
    done = Refreshed()
    with resumed_directory(out, manifest) as building:
        parts = sorted(
            _parts(old, job, building, manifest, forget, done), key=lambda part: part.file
        )
        if not parts:
            raise InputError(f"{data}: no row is left; nothing was written")
        rows = sum(part.rows for part in parts)
        update: dict[str, Any] = {"rows": rows, "parts": parts, "complete": True}
        if manifest.level != "user" and (cutoff := _common_cutoff(building, parts)) is not None:
            update["cutoff"] = manifest.cutoff.model_copy(update=cutoff)
        done.manifest = manifest.model_copy(update=update)
        verify(building, done.manifest)
        write_manifest(building, done.manifest)
    for child, successor in children:
        recompress(out, child, successor)
    return done


def _refuse(old: KnowledgeStore, children: Sequence[tuple[str | Path, str | Path]]) -> None:
    from llm_knowledge.store.manifest import read_manifest

    if old.manifest.compression is not None or old.manifest.note:
        raise InputError(f"{old.path}: is derived from another store; refresh that one")
    for child, successor in children:
        if old.fingerprint not in read_manifest(child).parents:
            raise InputError(f"{child}: is no child of {old.path}")
        if Path(successor).exists():
            raise InputError(f"{successor}: exists; choose a new directory")


def _same_model(
    about: Manifest, data: Path, out: Path, options: dict[str, Any]
) -> tuple[ExtractConfig, Any]:
    """The configuration that made the store, and its encoder."""
    from llm_knowledge.encoding.encoder import Encoder
    from llm_knowledge.extraction.config import ExtractConfig

    if about.profile is None and about.level == "user":
        raise InputError(
            "the store does not say how many items a prompt may have: it was written by "
            "an older version; extract once more"
        )
    sizes = about.profile.model_dump() if about.profile else {}
    made_with: dict[str, Any] = dict(
        data=data,
        out=out,
        level=about.level,
        revision=about.model.revision,
        pooling=about.pooling,
        layer=about.layer,
        dtype=about.model.precision,
        store_dtype=about.dtype,
        normalize=about.normalized,
        max_tokens=about.model.max_tokens,
        chat_template="auto" if about.model.chat_template else "off",
        progress=False,
        answer_tokens=about.model.answer.tokens if about.model.answer else 0,
        state=about.model.answer.state if about.model.answer else "prompt",
        **sizes,
    )
    given = {name: value for name, value in options.items() if (name, value) != ("template", None)}
    config = ExtractConfig(**(made_with | {"template": about.template.name} | given))
    encoder = Encoder(**config.encoder_options())
    return config, encoder


def _refuse_other(old: KnowledgeStore, new: Manifest) -> Manifest:
    before, now = old.manifest.model_dump(), new.model_dump()
    names = ("model", "template", "pooling", "layer", "dim", "key_type", "normalized", "dtype")
    differ = [
        f"{name}: {before[name]!r} there, {now[name]!r} now"
        for name in names
        if before[name] != now[name]
    ]
    if differ:
        raise InputError(
            f"{old.path}: {'; '.join(differ)}; a refresh takes the model and the template "
            f"that made the store, extract anew for others"
        )
    return new


def _keys(old: KnowledgeStore, remove: Sequence[int | str]) -> set[Any]:
    if old.manifest.key_type == "string":
        return {str(key) for key in remove}
    try:
        return {int(key) for key in remove}
    except ValueError as error:
        raise InputError(f"--remove: keys of {old.path} are integers ({error})") from error


def _parts(
    old: KnowledgeStore, job: Job, out: Path, manifest: Manifest, forget: set[Any], done: Refreshed
) -> Iterator[Part]:
    """Writes the parts: chunks wait until enough prompts have changed, then go together."""
    from llm_knowledge.extraction.job import profile_options
    from llm_knowledge.profiles.dataset import profile_batches

    config = job.config
    options = profile_options(config, job.template)
    seen, index, unmet = np.zeros(len(old), bool), 0, set(forget)
    waiting: list[tuple[int, _Chunk]] = []
    with workspace(out / "profiles") as scratch:
        batches = profile_batches(job.dataset, config.level, options, job._chunk(), scratch)
        for batch in batches:
            unmet -= set(batch["key"].to_pylist()) if unmet else set()
            chunk = _compare(old, job, batch, forget, done, seen)
            if not chunk.keys:
                continue
            part = _earlier_part(out, index, manifest, chunk)
            if part is not None:
                yield part
            else:
                waiting.append((index, chunk))
            index += 1
            enough = sum(len(chunk.new) for _, chunk in waiting) >= WAITING_PROMPTS
            if enough or sum(len(chunk.keys) for _, chunk in waiting) >= WAITING_ROWS:
                yield from _flush(old, job, out, manifest, waiting)
                waiting = []
        yield from _flush(old, job, out, manifest, waiting)
    old_rows = old.row_of(list(forget)) if forget else np.empty(0, np.int64)
    unmet -= {key for key, row in zip(forget, old_rows, strict=True) if row >= 0}
    if unmet:
        raise InputError(
            f"--remove: key {min(unmet)!r} is neither in {old.path} nor in "
            f"{config.data}; nothing was written"
        )
    done.removed = int((old_rows >= 0).sum())
    done.gone = int((~seen).sum()) - int((~seen[old_rows[old_rows >= 0]]).sum())


def _compare(
    old: KnowledgeStore,
    job: Job,
    batch: pa.RecordBatch,
    forget: set[Any],
    done: Refreshed,
    seen: np.ndarray,
) -> _Chunk:
    """Rows of one batch of profiles: kept where the prompt is the one that the old store has."""
    rows = batch.to_pylist()
    old_rows = old.row_of([row["key"] for row in rows])
    seen[old_rows[old_rows >= 0]] = True
    stay = [row_number for row_number, row in enumerate(rows) if row["key"] not in forget]
    rows, old_rows = [rows[row_number] for row_number in stay], old_rows[stay]
    profiles = [json.loads(row["data"]) for row in rows]
    # Whole prompts first: nothing needs its tokens counted that is what it was.
    prompts = [job.renderer.text(profile) for profile in profiles]
    known = np.flatnonzero(old_rows >= 0)
    before = dict(zip(known.tolist(), old.read_text(old_rows[known]), strict=True))
    same = [
        row_number in before and before[row_number]["prompt"] == text
        for row_number, text in enumerate(prompts)
    ]
    rest = [row_number for row_number in range(len(rows)) if not same[row_number]]
    for row_number, text in zip(rest, job.renderer.render(profiles[p] for p in rest), strict=True):
        prompts[row_number] = text
        same[row_number] = row_number in before and before[row_number]["prompt"] == text
    new = [row_number for row_number in rest if not same[row_number]]
    done.kept += len(rows) - len(new)
    done.changed += sum(old_rows[row_number] >= 0 for row_number in new)
    done.added += sum(old_rows[row_number] < 0 for row_number in new)
    answers = [
        before[row_number]["answer"] if same[row_number] else None
        for row_number in range(len(rows))
    ]
    return _Chunk(
        [row["key"] for row in rows],
        [row["cutoff"] for row in rows],
        prompts,
        answers,
        np.where(same, old_rows, -1),
        new,
    )


def _earlier_part(out: Path, index: int, manifest: Manifest, chunk: _Chunk) -> Part | None:
    """The part of this chunk, if a refresh that was killed wrote it already."""
    from llm_knowledge.store.manifest import Part, file_checksum, part_name
    from llm_knowledge.store.reader import check_footer, open_part

    file = out / part_name(index)
    if not file.exists():
        return None
    try:
        with open_part(file) as part:
            check_footer(file, part, manifest, len(chunk.keys))
            # Reading the whole part checks the checksum of every page.
            table = part.read()
    except (InputError, OSError):
        return None
    if any(
        table[name].to_pylist() != mine
        for name, mine in (
            ("key", chunk.keys),
            ("prompt", chunk.prompts),
            ("cutoff", chunk.cutoffs),
        )
    ):
        return None
    return Part(
        file=file.name,
        rows=len(chunk.keys),
        key_min=chunk.keys[0],
        key_max=chunk.keys[-1],
        checksum=file_checksum(file),
    )


def _flush(
    old: KnowledgeStore, job: Job, out: Path, manifest: Manifest, waiting: list[tuple[int, _Chunk]]
) -> Iterator[Part]:
    from llm_knowledge.encoding.encoder import BLOCK_TEXTS
    from llm_knowledge.store.writer import write_part

    texts = [chunk.prompts[position] for _, chunk in waiting for position in chunk.new]
    starts = range(0, len(texts), BLOCK_TEXTS)
    encoded, said = job.encoder.read(texts[start : start + BLOCK_TEXTS] for start in starts)
    used = 0
    for index, chunk in waiting:
        vectors = np.empty((len(chunk.keys), manifest.dim), np.float32)
        kept = chunk.old_rows >= 0
        rows = chunk.old_rows[kept]
        if rows.size:
            block = old.read_vectors(int(rows[0]), int(rows[-1]) + 1)
            vectors[kept] = block[rows - rows[0]]
        vectors[chunk.new] = encoded[used : used + len(chunk.new)]
        for position, text in zip(chunk.new, said[used:] if said else [], strict=False):
            chunk.answers[position] = text
        used += len(chunk.new)
        yield write_part(
            out, index, manifest, chunk.keys, vectors, chunk.prompts, chunk.answers, chunk.cutoffs
        )


def _common_cutoff(path: Path, parts: list[Part]) -> dict[str, Any] | None:
    """The one cut-off of all rows (scenarios of a global split), as `extract` writes it."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path / part.file, columns=["cutoff"]) for part in parts]
    cutoffs = {value for table in tables for value in table["cutoff"].to_pylist()}
    if len(cutoffs) != 1 or None in cutoffs:
        return None
    return {"kind": "global", "value": cutoffs.pop()}
