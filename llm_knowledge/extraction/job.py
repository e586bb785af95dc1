"""One level of an extraction, as one worker runs it: plan, encode the claimed chunks, finish."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from llm_knowledge.dataset_files import dataset_origin
from llm_knowledge.encoding.encoder import BLOCK_TEXTS
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.progress import Progress
from llm_knowledge.extraction.workers import Workers, wait_until
from llm_knowledge.files import new_file, remove_abandoned, workspace
from llm_knowledge.locks import directory_lock
from llm_knowledge.profiles.dataset import Dataset, ProfileOptions, profile_batches
from llm_knowledge.prompts import Renderer, Template, default_template, load_template
from llm_knowledge.store.manifest import (
    JOB_KEY,
    AnswerInfo,
    Cutoff,
    Manifest,
    ModelInfo,
    Part,
    ProfileInfo,
    TemplateInfo,
    file_checksum,
    fingerprint_of,
    part_name,
    read_manifest,
)
from llm_knowledge.store.reader import check_footer, open_part, verify
from llm_knowledge.store.writer import write_manifest, write_part

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from llm_knowledge.encoding.encoder import Encoder
    from llm_knowledge.extraction.config import ExtractConfig

# A directory with more files than this is slow to list and to verify: chunks grow instead.
MOST_PARTS = 10_000


def lead(workers: Workers, name: str, work: Callable[[], Any]) -> Any:
    """Runs `work` on rank 0 alone; every worker gets its result, or stops if it fails."""
    if workers.rank == 0:
        try:
            result = work()
        except BaseException as error:
            workers.publish(name, {"error": str(error) or repr(error)})
            raise
        workers.publish(name, {"result": result})
        return result
    answer = workers.receive(name)
    if "error" in answer:
        refused = InputError(answer["error"])
        refused.shared = True
        raise refused
    return answer["result"]


class Job:
    """One level of an extraction in one worker."""

    def __init__(self, config: ExtractConfig, encoder: Encoder, workers: Workers) -> None:
        self.config, self.encoder, self.workers = config, encoder, workers
        self.dataset: Dataset = Dataset.open(config.data)
        name = config.template or default_template(config.level, encoder.kind)
        self.template: Template = load_template(name, config.level)
        self.renderer: Renderer = Renderer(
            self.template,
            self.dataset.scenarios,
            self.dataset.positive_name,
            self.dataset.negative_name,
            encoder.count_tokens,
            encoder.max_tokens,
        )
        self.profiles = config.out / "profiles.parquet"

    @property
    def stage(self) -> str:
        """Names this store among all that the workers make together."""
        cutoff = self.config.cutoff
        return self.config.level if cutoff is None else f"{self.config.level}@{cutoff}"

    def run(self) -> None:
        """Leads (rank 0) or follows, until the store is complete."""
        stage, leader = self.stage, self.workers.rank == 0
        with ExitStack() as held:

            def prepare() -> list[int] | None:
                held.enter_context(directory_lock(self.config.out))
                # First, also where the store is complete: a run may die just after its manifest.
                remove_abandoned(self.config.out)
                return self._prepare()

            missing = lead(self.workers, f"{stage}/plan", prepare)
            if missing is not None:
                self._work(missing)
                if leader:
                    self._finish()
            if leader:
                # Not in _finish: a run that died after its manifest has left them to the next one.
                self.profiles.unlink(missing_ok=True)
        if leader:
            self.workers.publish(f"{stage}/done", {})
        else:
            self.workers.receive(f"{stage}/done")

    def _manifest(self) -> Manifest:
        """The manifest before any part exists: it says what is being made."""
        config, encoder, level = self.config, self.encoder, self.config.level
        about = [self.dataset.fingerprint(level, config.cutoff)]
        about += [] if config.cutoff is None else [f"cutoff {config.cutoff}"]
        unit: Any = "order" if self.dataset.raw.get("timestamps") == "order" else None
        cutoff = Cutoff(kind="per_key" if level == "user" else "none", unit=unit)
        if config.cutoff is not None:
            cutoff = Cutoff(kind="global", value=config.cutoff)
        if level == "user":
            about += [str(config.per_scenario), str(config.total)]
            about += [str(config.min_interactions)] if config.min_interactions > 1 else []
        return Manifest(
            level=level,  # type: ignore[arg-type]
            complete=False,
            model=ModelInfo(
                name=encoder.name,
                revision=encoder.revision,
                weights_hash=encoder.weights_hash,
                max_tokens=encoder.max_tokens,
                precision=encoder.dtype_name,
                chat_template=encoder.chat_hash,
                answer=AnswerInfo(tokens=encoder.answer_tokens, state=encoder.state)
                if encoder.answer_tokens
                else None,
            ),
            template=TemplateInfo(
                name=self.template.name, version=self.template.version, hash=self.template.hash
            ),
            pooling=encoder.pooling,
            layer=encoder.layer,
            dim=encoder.dim,
            dtype=config.store_dtype,  # type: ignore[arg-type]
            key_type=self.dataset.key_types[level],  # type: ignore[arg-type]
            rows=0,
            cutoff=cutoff,
            dataset=dataset_origin(config.data),
            input_fingerprint=fingerprint_of(about),
            normalized=encoder.normalize,
            profile=_profile_info(config),
            versions=_versions(),
        )

    def _prepare(self) -> list[int] | None:
        """Checks the directory, builds the profiles, lists the missing parts; None if all is done."""
        out, manifest = self.config.out, self._manifest()
        if (out / "manifest.json").exists():
            existing = read_manifest(out)
            _refuse_other_job(out, existing, manifest)
            if existing.complete:
                verify(out)
                return None
        else:
            strangers = [p.name for p in out.iterdir() if not p.name.startswith(".")]
            if strangers:
                raise InputError(
                    f"{out}: holds files of something else ({strangers[0]}); choose a new directory"
                )
            write_manifest(out, manifest)
        self._build_profiles(manifest.job)
        with open_part(self.profiles) as profiles:
            return [
                index
                for index in range(profiles.num_row_groups)
                if not _part_is_there(out, index, manifest, profiles)
            ]

    def _build_profiles(self, job: str) -> None:
        """Writes `profiles.parquet` once; a row group is a chunk, so that a worker reads its own."""
        if self.profiles.exists():
            with open_part(self.profiles) as old:
                if (old.schema_arrow.metadata or {}).get(JOB_KEY) == job.encode():
                    return
        options = profile_options(self.config, self.template)
        rows = self._chunk()
        writer = None
        with workspace(self.profiles) as scratch:
            batches = profile_batches(self.dataset, self.config.level, options, rows, scratch)
            with new_file(self.profiles) as temporary:
                try:
                    for batch in batches:
                        schema = batch.schema.with_metadata({JOB_KEY: job.encode()})
                        writer = writer or pq.ParquetWriter(temporary, schema, compression="zstd")
                        writer.write_batch(batch.replace_schema_metadata(schema.metadata), rows)
                finally:
                    if writer:
                        writer.close()
                if writer is None:
                    raise InputError(f"{self.config.data}: no {self.config.level} to extract")

    def _chunk(self) -> int:
        """Keys of one part: by the number of keys alone, never by the number of workers."""
        keys = (
            int(self.dataset.raw.get(f"{self.config.level}s") or 0)
            if self.config.level != "scenario"
            else 0
        )
        chunk = self.config.chunk or min(256, max(64, -(-keys // 32)))
        return max(chunk, -(-keys // MOST_PARTS))

    def _work(self, missing: list[int]) -> None:
        """Claims chunks until none is left. Rank 0 shows the progress of all workers."""
        stage, count = self.stage, self.workers.count

        def claim() -> int:
            return count(f"{stage}/next", 1) - 1

        next_chunk = claim()
        if next_chunk >= len(missing) and self.workers.rank:
            return  # the others were faster, and rank 0 may have finished and removed the profiles
        manifest = self._manifest()
        with open_part(self.profiles) as profiles:
            sizes = [profiles.metadata.row_group(index).num_rows for index in missing]
            total = profiles.metadata.num_rows
            progress = Progress(
                self.workers,
                stage,
                total,
                total - sum(sizes),
                self.encoder.counters,
                self.config.progress,
            )
            while next_chunk < len(missing):
                index = missing[next_chunk]
                progress.begin(sizes[next_chunk])
                rows = profiles.read_row_group(index)
                prompts, vectors, answers = self._encode(rows["data"].to_pylist())
                write_part(
                    self.config.out,
                    index,
                    manifest,
                    rows["key"].to_pylist(),
                    vectors,
                    prompts,
                    answers,
                    rows["cutoff"].to_pylist(),
                )
                progress.add(len(rows))
                count(f"{stage}/parts", 1)
                next_chunk = claim()
            if self.workers.rank == 0:

                def all_done() -> bool:
                    progress.draw()
                    return count(f"{stage}/parts", 0) >= len(missing)

                if not wait_until(all_done, timedelta(minutes=self.config.timeout_minutes)):
                    raise RuntimeError("a worker did not finish its chunk in time; start again")
            progress.close()

    def _encode(self, data: list[str]) -> tuple[list[str], np.ndarray, list[str] | None]:
        """Prompts, vectors and answers of profiles.

        The next prompts are written while the model reads.
        """
        prompts: list[str] = []

        def blocks() -> Iterator[list[str]]:
            for at in range(0, len(data), BLOCK_TEXTS):
                block = self.renderer.render(map(json.loads, data[at : at + BLOCK_TEXTS]))
                prompts.extend(block)
                yield block

        vectors, answers = self.encoder.read(blocks())
        return prompts, vectors, answers

    def _finish(self) -> None:
        """Lists all parts in the manifest, verifies the store, then calls it complete."""
        out, parts = self.config.out, []
        with open_part(self.profiles) as profiles:
            cutoffs = profiles.read(["cutoff"])["cutoff"]
            for index in range(profiles.num_row_groups):
                keys = profiles.read_row_group(index, columns=["key"])["key"]
                parts.append(
                    Part(
                        file=part_name(index),
                        rows=len(keys),
                        key_min=keys[0].as_py(),
                        key_max=keys[-1].as_py(),
                        checksum=file_checksum(out / part_name(index)),
                    )
                )
        update: dict[str, Any] = {"rows": len(cutoffs), "parts": parts, "complete": True}
        if self.config.level != "user" and cutoffs.null_count == 0:
            whole = {"kind": "global", "value": cutoffs[0].as_py()}
            update["cutoff"] = self._manifest().cutoff.model_copy(update=whole)
        manifest = self._manifest().model_copy(update=update)
        verify(out, manifest)
        write_manifest(out, manifest)


def profile_options(config: ExtractConfig, template: Template) -> ProfileOptions:
    """What the profiles of an extraction are made with."""
    return ProfileOptions(
        config.per_scenario,
        config.total,
        min_interactions=config.min_interactions,
        cutoff=config.cutoff,
        tastes="{tastes}" in template.body,
        engine=config.engine,
        spark_master=config.spark_master,
        memory_limit=config.memory_limit,
    )


def _profile_info(config: ExtractConfig) -> ProfileInfo | None:
    if config.level == "item" or (config.level == "scenario" and config.cutoff is None):
        return None
    at_least = config.min_interactions if config.min_interactions > 1 else None
    return ProfileInfo(
        per_scenario=config.per_scenario,
        total=config.total,
        min_interactions=at_least,
        cutoff=config.cutoff,
    )


def _versions() -> dict[str, str]:
    import duckdb
    import pyarrow
    import torch
    import transformers

    modules = (duckdb, pyarrow, torch, transformers)
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
    }


def _refuse_other_job(out: Path, existing: Manifest, manifest: Manifest) -> None:
    if existing.job == manifest.job:
        return
    old, new = existing.model_dump(), manifest.model_dump()
    differ = [
        f"{name}: {old[name]!r} there, {new.get(name)!r} now"
        for name in old
        if name not in ("complete", "rows", "cutoff", "parts", "versions")
        and old[name] != new.get(name)
    ]
    raise InputError(
        f"{out}: holds the knowledge of another job ({'; '.join(differ)}); choose "
        f"another --out or remove it"
    )


def _part_is_there(out: Path, index: int, manifest: Manifest, profiles: pq.ParquetFile) -> bool:
    """Whether a part of this job with this chunk's keys is on disk and can be read through."""
    file = out / part_name(index)
    if not file.exists():
        return False
    try:
        with open_part(file) as part:
            check_footer(file, part, manifest, profiles.metadata.row_group(index).num_rows)
            # Reading the whole part checks the checksum of every page.
            keys = part.read()["key"]
    except (InputError, OSError):
        return False
    return keys.equals(profiles.read_row_group(index, columns=["key"])["key"])
