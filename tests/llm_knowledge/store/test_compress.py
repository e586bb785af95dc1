import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from llm_knowledge.errors import InputError
from llm_knowledge.store import compress as module
from llm_knowledge.store.compress import compress, fit, recompress
from llm_knowledge.store.manifest import read_manifest
from llm_knowledge.store.reader import KnowledgeStore, verify
from llm_knowledge.store.writer import write_manifest, write_store
from tests.helpers.knowledge_data import manifest
from tests.helpers.paths import ROOT


def vectors(rows, dim, rank=None, seed=0):
    """Rows of falling variance around a mean far from zero, in rotated axes."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    spread = 0.7 ** np.arange(dim) * (np.arange(dim) < (rank or dim))
    return ((rng.normal(size=(rows, dim)) * spread) @ turn.T + 3 * turn[0]).astype(np.float32)


def store(path, rows=300, dim=24, dtype="float32", values=None, **update):
    values = vectors(rows, dim) if values is None else values
    keys = list(range(10, 10 + 3 * len(values), 3))
    texts = [f"prompt {key}" for key in keys]
    write_store(
        path,
        manifest(dim=values.shape[1], dtype=dtype, **update),
        keys,
        values,
        texts,
        [None if key % 2 else f"answer {key}" for key in keys],
        [None if key % 5 == 0 else key for key in keys],
        rows_per_part=128,
    )
    return path


def same_rows(one, other):
    a, b = KnowledgeStore.open(one), KnowledgeStore.open(other)
    np.testing.assert_array_equal(a.keys(), b.keys())
    np.testing.assert_array_equal(a.cutoffs(), b.cutoffs())
    assert a.read_text(range(len(a))) == b.read_text(range(len(b)))


def test_pca_equals_a_singular_value_decomposition(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 24 * 77)  # several blocks, cut across the parts
    source = KnowledgeStore.open(store(tmp_path / "s"))
    found = fit(source, 5, "pca")
    rows = source.read_vectors(0, 300).astype(np.float64)
    _, singular, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(found.mean_D, rows.mean(0), atol=1e-9)
    np.testing.assert_allclose(np.abs(np.diag(right[:5] @ found.basis_DK)), 1, atol=1e-9)
    assert found.retained == pytest.approx(
        (singular[:5] ** 2).sum() / (singular**2).sum(), abs=1e-9
    )
    compress(tmp_path / "s", tmp_path / "c", 5)
    stored = KnowledgeStore.open(tmp_path / "c").read_vectors(0, 300)
    expected = (rows - rows.mean(0)) @ found.basis_DK
    np.testing.assert_allclose(stored, expected, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("method", ["pca", "truncate"])
def test_all_else_is_carried_over(tmp_path, method, dtype):
    source = store(tmp_path / "s", dtype="float16")
    done = compress(source, tmp_path / "c", 6, method, dtype)
    verify(tmp_path / "c")
    same_rows(source, tmp_path / "c")
    small = KnowledgeStore.open(tmp_path / "c")
    assert small.manifest == done == read_manifest(tmp_path / "c")
    assert (done.dim, done.dtype, done.rows) == (6, dtype, 300)
    assert done.parents == [KnowledgeStore.open(source).fingerprint]
    assert [part.rows for part in done.parts] == [128, 128, 44]
    assert small.fingerprint != KnowledgeStore.open(source).fingerprint
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_nothing_is_lost_where_the_rank_is_kept(tmp_path):
    source = store(tmp_path / "s", values=vectors(200, 16, rank=4))
    lost = compress(source, tmp_path / "c", 4).compression
    assert lost.retained_variance == pytest.approx(1, abs=1e-6)
    assert lost.neighbour_overlap > 0.98
    assert lost.cosine_error < 1e-6
    assert (lost.source_dim, lost.sample_rows, lost.method) == (16, 200, "pca")
    less = compress(source, tmp_path / "d", 1).compression
    assert less.retained_variance < 0.8
    assert less.neighbour_overlap < lost.neighbour_overlap
    assert less.cosine_error > lost.cosine_error
    coarse = compress(source, tmp_path / "e", 4, dtype="int8").compression
    assert 1e-9 < coarse.cosine_error < 1e-3


def test_truncated_vectors_keep_their_length(tmp_path):
    values = vectors(150, 16)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    source = store(tmp_path / "s", values=values, normalized=True)
    done = compress(source, tmp_path / "c", 4, "truncate")
    found = KnowledgeStore.open(tmp_path / "c").read_vectors(0, 150)
    expected = values[:, :4] / np.linalg.norm(values[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert done.normalized
    assert not compress(source, tmp_path / "d", 4).normalized  # PCA moves the origin


def test_what_is_refused(tmp_path):
    source = store(tmp_path / "s")
    for dim in (0, 25):
        with pytest.raises(InputError, match=r"outside 1\.\.24"):
            compress(source, tmp_path / "c", dim)
    few = store(tmp_path / "few", rows=4)
    with pytest.raises(InputError, match="4 rows span at most 3"):
        compress(few, tmp_path / "c", 8)
    compress(source, tmp_path / "c", 4)
    with pytest.raises(InputError, match="is not empty"):
        compress(source, tmp_path / "c", 4)
    with pytest.raises(InputError, match="compress its source"):
        compress(tmp_path / "c", tmp_path / "d", 2)
    write_manifest(source, read_manifest(source).model_copy(update={"complete": False}))
    with pytest.raises(InputError, match="the store is incomplete"):
        compress(source, tmp_path / "d", 4)
    assert not (tmp_path / "d").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source = store(tmp_path / "s")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", full)
    with pytest.raises(InputError, match="No space left"):
        compress(source, tmp_path / "c", 4)
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    verify(source)


@pytest.mark.parametrize(
    ("method", "dtype"), [("pca", "float16"), ("pca", "int8"), ("truncate", "int8")]
)
def test_the_same_projection_again(tmp_path, method, dtype):
    source = store(tmp_path / "s")
    first = compress(source, tmp_path / "c", 6, method, dtype)
    again = recompress(source, tmp_path / "c", tmp_path / "d")
    assert again == first
    (tmp_path / "c" / "projection.safetensors").unlink(missing_ok=True)
    if method == "pca":
        with pytest.raises(InputError, match="is missing"):
            recompress(source, tmp_path / "c", tmp_path / "e")
    with pytest.raises(InputError, match="is not a compressed store"):
        recompress(source, source, tmp_path / "e")
    other = store(tmp_path / "o", layer=-2)
    with pytest.raises(InputError, match="layer differs"):
        recompress(other, tmp_path / "d", tmp_path / "e")


@pytest.mark.slow
def test_large_vectors_in_bounded_memory(tmp_path):
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(32, 4096)).astype(np.float32)
    values = (rng.normal(size=(20_000, 32)).astype(np.float32) @ factors).astype(np.float16)
    source = store(tmp_path / "s", values=values, dtype="float16")
    code = (
        "import json, resource, sys; from llm_knowledge.store.compress import compress;"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "done = compress(sys.argv[1], sys.argv[2], 32);"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(json.dumps([peak - base, done.compression.retained_variance]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "c")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    grown_kib, retained = json.loads(run.stdout)
    assert resource.getpagesize()  # ru_maxrss is in KiB on Linux
    # Covariance and its eigenvectors are 134 MB each, with LAPACK's work space; the vectors are
    # 328 MB as they are stored and 655 MB as float64.
    assert grown_kib < 1_100_000
    assert retained > 0.999
    verify(tmp_path / "c")


def test_neighbours_kept_are_counted_as_by_hand(tmp_path):
    values = vectors(500, 12, seed=3)
    compressed = compress(store(tmp_path / "s", values=values), tmp_path / "c", 2)

    def nearest(path):
        rows = KnowledgeStore.open(path).read_vectors(0, 500).astype(np.float64)
        distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
        order = np.argsort(distance + np.diag(np.full(500, np.inf)), axis=1)
        return [set(line[:10].tolist()) for line in order]

    pairs = zip(nearest(tmp_path / "s"), nearest(tmp_path / "c"), strict=True)
    kept = np.mean([len(before & after) for before, after in pairs]) / 10
    assert 0.2 < kept < 0.95
    assert compressed.compression.neighbour_overlap == pytest.approx(kept, abs=1e-9)
