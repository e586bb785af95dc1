"""Workers of an extraction die by ``kill -9`` at random moments; the store is as if nothing happened.

Workers are forked from a process that has imported everything, so that a start costs a blink.
"""

import os
import random
import resource
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.errors import InputError
from llm_knowledge.extraction import job
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.files import WORKSPACE_SUFFIX
from llm_knowledge.store.manifest import Manifest
from llm_knowledge.store.reader import KnowledgeStore, verify
from tests.helpers.knowledge_data import random_dataset, tiny_encoder

USERS, CHUNK, WORKERS, MOMENTS = 60, 3, 2, 20


def small_config(tmp_path: Path, users: int = USERS, chunk: int = CHUNK) -> ExtractConfig:
    """An extraction of random users with a tiny encoder."""
    bert = tiny_encoder(tmp_path / "bert")
    data = random_dataset(tmp_path / "data", users=users)
    return ExtractConfig(
        data=data,
        out=tmp_path / "out",
        model=str(bert),
        progress=False,
        device="cpu",
        chunk=chunk,
        timeout_minutes=0.5,
    )


def worker(config: ExtractConfig, rank: int, port: int) -> int:
    """Fork one worker of ``WORKERS``; returns its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(WORKERS),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with open(os.devnull, "w") as nowhere:  # what a dying peer makes the others say
            os.dup2(nowhere.fileno(), 2)
        extract(config)
        code = 0
    finally:
        os._exit(code)


def run(config: ExtractConfig, kill: str | None, after: float, victim: int) -> bool:
    """Run all workers; kill one (then, as torchrun does, the others) or all. True: it finished."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    living = [worker(config, rank, port) for rank in range(WORKERS)]
    begun, codes, struck = time.monotonic(), [], kill is None
    while living:
        if not struck and time.monotonic() - begun > after:
            struck = True
            for child in [living[victim % len(living)]] if kill == "one" else living:
                os.kill(child, signal.SIGKILL)
        for child in list(living):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                living.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        if any(codes):
            for child in living:
                os.kill(child, signal.SIGKILL)
        assert time.monotonic() - begun < 60, "a worker hangs"
        time.sleep(0.001)
    return not any(codes)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kill", ["one", "all"])
def test_killed_at_random_moments(tmp_path: Path, kill: str) -> None:
    seed = int(os.environ.get("DRILL_SEED", time.time_ns() % 1_000_000))
    print(f"DRILL_SEED={seed} repeats these moments")
    rng = random.Random(seed)
    common = small_config(tmp_path)
    whole = extract(common.replace(out=tmp_path / "whole"))
    undisturbed = KnowledgeStore.open(whole)
    expected = undisturbed.read_vectors(0, USERS)
    begun = time.monotonic()
    assert run(common.replace(out=tmp_path / "timed"), None, 0, 0)
    length = time.monotonic() - begun
    moments = MOMENTS if kill == "one" else MOMENTS // 4
    died = 0
    for moment in range(moments):
        config = common.replace(out=tmp_path / f"{kill}-{moment}")
        after, victim = rng.uniform(0, length), rng.randrange(WORKERS)
        starts = 1
        if not run(config, kill, after, victim):
            died += 1
            while not run(config, None, 0, 0):
                starts += 1
                assert starts < 4, f"seed {seed}, moment {moment}: does not finish"
        verify(config.out)
        found = KnowledgeStore.open(config.out)
        np.testing.assert_array_equal(found.keys(), undisturbed.keys())
        np.testing.assert_array_equal(found.cutoffs(), undisturbed.cutoffs())
        assert found.read_text(range(USERS)) == undisturbed.read_text(range(USERS))
        np.testing.assert_allclose(found.read_vectors(0, USERS), expected, atol=1e-3)
        names = sorted(file.name for file in config.out.iterdir())
        assert names == [
            "manifest.json",
            *(f"part-{part:05d}.parquet" for part in range(USERS // CHUNK)),
        ]
    print(f"{kill}: {died} of {moments} runs died, of {length:.2f} s each")
    assert died >= moments // 4


def test_killed_between_manifest_and_tidying_up(tmp_path: Path, monkeypatch) -> None:
    config = small_config(tmp_path)
    write, left = job.write_manifest, config.out / f".manifest.json.12345678{WORKSPACE_SUFFIX}"

    def dies(out: Path, manifest: Manifest) -> None:
        write(out, manifest)
        if manifest.complete:
            left.mkdir()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job, "write_manifest", dies)
        with pytest.raises(KeyboardInterrupt):
            extract(config)
    profiles = config.out / "profiles.parquet"
    assert profiles.exists()
    parts = {file: file.stat().st_mtime_ns for file in config.out.glob("part-*")}
    extract(config)
    assert not profiles.exists()
    assert not left.exists()
    assert parts == {file: file.stat().st_mtime_ns for file in config.out.glob("part-*")}
    verify(config.out)


def test_a_second_run_on_one_store_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    whole, refused = Encoder.read, []

    def second(self, blocks):
        if not refused:
            with pytest.raises(InputError, match="another run is writing here") as told:
                extract(config)
            refused.append(told)
        return whole(self, blocks)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Encoder, "read", second)
        extract(config)
    assert len(refused) == 1
    verify(config.out)


@pytest.mark.parametrize("limit", [900, 4000])
def test_files_that_cannot_grow_end_the_run_and_cost_nothing(
    tmp_path: Path, limit: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel refuses to write more than ``limit`` bytes to a file, as on a full disk."""
    config = small_config(tmp_path, users=20, chunk=10)
    if (child := os.fork()) == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            extract(config)
        except InputError as error:
            code = 2 if "cannot be written" in str(error) else 3
            print(error, flush=True)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2, capfd.readouterr()
    assert not list(config.out.glob(".part*"))
    extract(config)
    verify(config.out)
    assert len(list(config.out.iterdir())) == 3
