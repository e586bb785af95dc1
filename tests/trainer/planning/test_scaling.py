"""What docs/results/scaling.md says is what the formulas give, and the formulas are what two ranks count."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import PAGE, filled, page_tables
from llm_knowledge.encoding.encoder import Encoder
from tests.helpers.knowledge_data import tiny_decoder
from tests.trainer.training.test_train import ENVIRONMENT, ROOT
from trainer.planning.scaling import Decoder, Description, extraction_flops, flops_per_sample

HEADER_BYTES = 2048  # of a tensor's piece in a checkpoint: the format's own


@pytest.mark.slow
def test_the_page_is_what_formulas_and_results_give() -> None:
    text = PAGE.read_text()
    assert filled(text, page_tables()) == text, "run python -m benchmarks.scaling"


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("scale")
    command = [sys.executable, "-m", "tests.drills.scale_count", str(root)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads((root / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.distributed
def test_rows_and_state_take_the_bytes_that_two_ranks_hold(counts: dict[str, Any]) -> None:
    for run in counts["runs"]:
        for part, sizes in run["memory"].items():
            assert sizes["counted"] == sizes["predicted"], part
            assert min(sizes["counted"]) > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpoint_has_the_bytes_that_are_on_disk(counts: dict[str, Any]) -> None:
    for run in counts["runs"]:
        found = run["checkpoint"]
        assert found["metadata"] == found["predicted"]
        assert 0 < found["disk"] - found["predicted"] < HEADER_BYTES * (found["pieces"] + 10)


@pytest.mark.slow
@pytest.mark.distributed
def test_memory_moves_the_bytes_of_ids_vectors_and_rows(counts: dict[str, Any]) -> None:
    assert len(counts["moved"]) == 18
    for cell in counts["moved"]:
        assert cell["counted"] == cell["predicted"], cell["cell"]


@pytest.mark.slow
def test_prompts_take_the_tokens_and_flops_that_are_counted(tmp_path: Path) -> None:
    from transformers import AutoModel, DynamicCache

    path = tiny_decoder(tmp_path / "model")
    model = AutoModel.from_pretrained(path, attn_implementation="eager")
    decoder = Decoder(2, 64, 96, 4, 2, 16)
    shared, tokens, prompts = 20, 50, 3
    ids = torch.randint(2, 96, (prompts, tokens))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    assert counter.get_total_flops() == prompts * extraction_flops(decoder, tokens, 0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(prompts)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, shared:], past_key_values=cache, use_cache=True)
    assert counter.get_total_flops() == prompts * extraction_flops(decoder, tokens, shared)

    encoder = Encoder(str(path))
    texts = ["A" * 64 + chr(66 + i) * (10 + i) for i in range(24)]
    encoder.encode(texts)
    before = encoder.counters.computed
    encoder.encode(texts)  # the prefix is there, and everything was checked
    lengths = encoder.count_tokens(texts)
    assert encoder.counters.reused > 0
    assert encoder.counters.computed - before == sum(length - 64 for length in lengths)


def test_flops_of_the_dense_part_are_all_counted() -> None:
    """Every weight of the backbone is used once per sample: two FLOPs forward, four backward."""
    description = Description(users=10, items=10, dim=8, knowledge_dim=16)
    model = description.model()
    model.dense.meta = None
    backbone = model.dense.backbone
    shared = sum(layer.shared.weight.numel() for layer in (*backbone.layers, backbone.out))
    auxiliary = sum(p.numel() for p in backbone.auxiliary.parameters() if p.dim() == 2)
    assert flops_per_sample(model, description) == 6 * (shared + auxiliary)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.namespaces
def test_hosts_send_the_bytes_of_the_formulas(tmp_path: Path) -> None:
    """Training steps over two and four hosts; the kernel counts what leaves them, headers included."""
    command = [sys.executable, "-m", "benchmarks.network_scaling", "--out", str(tmp_path / "found")]
    command += ["--rounds", "1", "--steps", "2", "--warmup", "1", "--batch", "256", "--mbit", "800"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    arms = json.loads((tmp_path / "found").read_text())["arms"]
    sending = [arm["runs"][0] for arm in arms if arm["mbit"]]
    assert len(sending) == 5
    for run in sending:
        assert 0.95 < run["counted_bytes"] / run["formula_bytes"] < 1.15
