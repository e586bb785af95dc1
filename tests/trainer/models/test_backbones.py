"""Every backbone: the common interface, its parameter count, the page, and two ranks.

Run as a program under torchrun it is the other half of `test_two_ranks_compute_what_one_does`.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs
from tests.trainer.models.test_model import DIM, SCENARIOS, inputs, logits, shapes
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.restore import load_checkpoint
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.model import MetaConfig, ModelConfig
from trainer.config.run import RunConfig
from trainer.distributed.process_group import distributed
from trainer.models import BACKBONES
from trainer.models.layers import SCENARIO
from trainer.models.llm4msr import DenseModel
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.training.run_folder import prepare_folder
from trainer.training.validation import measure

PAGE = ROOT / "docs" / "reference" / "backbones.md"
# S is a prime that divides no other width here: what it divides belongs to the scenarios.
S, IN, HIDDEN, ROWS = 7, 24, [8, 6], 14
D = IN // 6
OWNING = {"shared_bottom", "mmoe", "ple", "star", "aitm", "sar_net", "hamur", "m3oe", "hinet"}
# Parameters with a part per scenario that, by design, learns from every scenario's samples.
SEEN_BY_ALL = {"m3oe": {"of_scenarios"}, "hinet": {"of_scenarios", "attention"}}
BLIND = set(BACKBONES) - OWNING  # know of the scenario what the input says


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


every_backbone = pytest.mark.parametrize("name", BACKBONES)


def make(name: str, tasks: int = 1, scenarios: int = S, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return BACKBONES[name](IN, scenarios, HIDDEN, dropout, tasks)


def samples(rows: int = ROWS, scenarios: int = S) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, IN, generator=generator), torch.arange(rows) % scenarios


# ---------------------------------------------------------------- the interface


@every_backbone
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("scenarios", [1, S, 100])
def test_one_logit_per_sample_and_task(name: str, tasks: int, scenarios: int) -> None:
    net = make(name, tasks, scenarios)
    for rows in (ROWS, 1, 0):
        found = net(*samples(rows, scenarios))
        assert found.shape == (rows, tasks)
        assert found.isfinite().all()


@every_backbone
def test_a_single_hidden_layer_is_enough(name: str) -> None:
    net = BACKBONES[name](IN, S, [8], 0.0, 2)
    net(*samples()).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def check_batch_mates(net: nn.Module) -> None:
    x, scenario = samples()
    whole = net(x, scenario)
    for row in range(ROWS):
        alone = net(x[row : row + 1], scenario[row : row + 1])[0]
        torch.testing.assert_close(alone, whole[row])


@every_backbone
def test_no_output_depends_on_batch_mates(name: str) -> None:
    check_batch_mates(make(name, tasks=3).train())


@every_backbone
def test_eval_is_deterministic_and_dropout_acts_in_training_only(name: str) -> None:
    net, batch = make(name, dropout=0.5), samples()
    assert torch.equal(net.eval()(*batch), net(*batch))
    net.train()
    assert not torch.equal(net(*batch), net(*batch))


def check_gradients(net: nn.Module) -> None:
    """The step of a data-parallel rank that saw one scenario only."""
    x, _ = samples()
    net.train()(x, torch.zeros(ROWS, dtype=torch.long)).square().sum().backward()
    assert [key for key, value in net.named_parameters() if value.grad is None] == []


@every_backbone
@pytest.mark.parametrize("tasks", [1, 3])
def test_every_parameter_gets_a_gradient_from_any_batch(name: str, tasks: int) -> None:
    check_gradients(make(name, tasks))


@every_backbone
@pytest.mark.parametrize("tasks", [1, 3])
def test_own_parameters_get_no_gradient_from_another_scenario(name: str, tasks: int) -> None:
    net = make(name, tasks)
    x, _ = samples()
    net(x, torch.zeros(ROWS, dtype=torch.long)).sum().backward()
    own = {
        key: parameter.grad.view(S, -1)
        for key, parameter in net.named_parameters()
        if parameter.dim() > 1
        and parameter.shape[0] % S == 0
        and key.split(".")[0] not in SEEN_BY_ALL.get(name, set())
    }
    assert bool(own) == (name in OWNING)
    for key, grad in own.items():
        assert grad[1:].abs().max() == 0, key
        assert grad[0].abs().max() > 0, key


@pytest.mark.parametrize("name", sorted(BLIND))
def test_scenario_speaks_through_its_embedding_alone(name: str) -> None:
    net, (x, scenario) = make(name), samples()
    assert torch.equal(net(x, scenario), net(x, scenario.flip(0)))
    other = x.clone()
    other[:, SCENARIO * D : (SCENARIO + 1) * D] += 1
    assert not torch.allclose(net(other, scenario), net(x, scenario))


@pytest.mark.parametrize("name", sorted(OWNING))
def test_scenario_number_chooses_own_parts(name: str) -> None:
    net, (x, scenario) = make(name), samples()
    for parameter in net.parameters():  # what begins equal in all scenarios is moved apart
        nn.init.normal_(parameter, std=0.5)
    assert not torch.allclose(net(x, scenario), net(x, scenario.flip(0)))


@pytest.mark.slow
@every_backbone
def test_overfits_a_handful_of_samples(name: str) -> None:
    net, (x, scenario) = BACKBONES[name](IN, S, [16, 8], 0.0, 2).train(), samples()
    labels = (torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(net(x, scenario), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@every_backbone
def test_works_in_mixed_precision(name: str) -> None:
    net = make(name, tasks=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(*samples())
    found.float().sum().backward()
    # A sample next to a threshold may fall to its other side, so the bulk is compared.
    assert (found - net(*samples())).abs().median() < 0.05


def dense_model(name: str, enabled: bool) -> DenseModel:
    torch.manual_seed(0)
    meta = MetaConfig(enabled=enabled, item_knowledge="match", user_layers=2)
    config = ModelConfig(backbone=name, hidden=HIDDEN, meta=meta)
    return DenseModel(config, shapes(), DIM)


@every_backbone
def test_llm4msr_around_it_starts_as_the_plain_backbone_and_learns(name: str) -> None:
    plain, lifted = dense_model(name, enabled=False), dense_model(name, enabled=True)
    torch.testing.assert_close(logits(lifted), logits(plain), rtol=0, atol=0)
    assert plain.scenario_embedding.num_embeddings == SCENARIOS
    lifted.train()(*inputs())[0].backward()
    assert [key for key, value in lifted.named_parameters() if value.grad is None] == []
    output = lifted.meta.scenario_layers.out.weight.grad
    assert output.abs().max() > 0


@pytest.mark.parametrize(
    "name", ["deepfm", "m2m", "ada_sparse", "epnet", "ppnet", "pepnet", "hinet"]
)
def test_input_that_is_not_six_blocks_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"in_features = 25 is not divisible by 6.*user, item"):
        BACKBONES[name](25, S, HIDDEN, 0.0, 1)


# ---------------------------------------------------------------- parameter counts


def linear(i: int, o: int) -> int:
    return i * o + o


def mlp(*widths: int) -> int:
    return sum(linear(i, o) for i, o in itertools.pairwise(widths))


def gate(i: int, o: int) -> int:
    return linear(i, o) + linear(o, o)


A, B = HIDDEN  # two hidden widths
TOWER = linear(B, B // 2) + linear(B // 2, 1)
# As in docs/reference/backbones.md, for T tasks.
COUNTS: dict[str, Callable[[int], int]] = {
    "shared_bottom": lambda t: mlp(IN, A, B) + S * (linear(B, B // 2) + linear(B // 2, t)),
    "mmoe": lambda t: 4 * mlp(IN, A, B) + S * linear(IN, t * 4) + S * t * TOWER,
    "ple": lambda t: (
        (S * t * 1 + 2) * mlp(IN, A, B)
        + S * t * (linear(IN, 1 + 2) + linear(A, 1 + 2))
        + linear(IN, t * 1 + 2)
        + S * t * TOWER
    ),
    "star": lambda t: (
        (1 + S) * mlp(IN, A, B, t) + 2 * IN + 2 * S * IN + linear(IN, B) + linear(B, t)
    ),
    "aitm": lambda t: t * mlp(IN, A, B) + (t - 1) * 4 * linear(B, B) + S * t * TOWER,
    "sar_net": lambda t: (
        2 * S * IN + 2 * IN + (4 + S * 1) * mlp(IN, A, B) + linear(IN, t * (4 + 1)) + t * TOWER
    ),
    "m2m": lambda t: (
        4 * mlp(IN, A, B)
        + t * B
        + linear(D, 8)
        + (8 + 1) * (linear(2 * B, 2 * B) + linear(B, B))
        + 2 * B
        + t * linear(B, 1)
    ),
    "ada_sparse": lambda t: mlp(IN, A, B, t) + sum((D + n) * n for n in (IN, A, B)),
    "adapt_dhm": lambda t: 3 * IN + (1 + 3) * mlp(IN, A, B, t),
    "epnet": lambda t: gate(D + IN, IN) + mlp(IN, A, B, t),
    "ppnet": lambda t: (
        t * mlp(IN, A, B) + gate(2 * D + IN, t * A) + gate(2 * D + IN, t * B) + t * linear(B, 1)
    ),
    "pepnet": lambda t: gate(D + IN, IN) + COUNTS["ppnet"](t),
    "hamur": lambda t: (
        mlp(IN, 64, 8 * 8)
        + S * mlp(IN, A, B, t)
        + sum(2 * 8 * (n + n // 2) + n + n // 2 + 2 * S * n for n in (A, B))
    ),
    "m3oe": lambda t: (
        (1 + S) * linear(IN, A)
        + linear(A, A)
        + linear(IN, A)
        + 4 * A
        + (4 + S + t) * linear(A, B)
        + S * linear(A, t * 4)
        + 4
        + S * t * TOWER
    ),
    "hinet": lambda t: (
        (1 + S) * 2 * (linear(IN, A) + linear(IN, 1))
        + linear(D, S)
        + (t + 1) * 2 * linear(3 * A, B)
        + linear(3 * A, t * 2 * 2)
        + S * t * TOWER
    ),
    "dnn": lambda t: mlp(IN, A, B, t),
    "dcnv2": lambda t: 2 * linear(IN, IN) + mlp(IN, A, B) + linear(IN + B, t),
    "deepfm": lambda t: linear(IN, t) + mlp(IN, A, B) + B * t,
}


@every_backbone
@pytest.mark.parametrize("tasks", [1, 3])
def test_parameter_count(name: str, tasks: int) -> None:
    assert sum(p.numel() for p in make(name, tasks).parameters()) == COUNTS[name](tasks)


# ---------------------------------------------------------------- the page


def test_page_lists_every_backbone() -> None:
    table = PAGE.read_text(encoding="utf-8").split("\n## ")[1]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(BACKBONES)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.slow
def test_add_your_own_is_short_and_works(tmp_path: Path) -> None:
    """The one line that the page names; then every common test of this file must pass with it."""
    page = (ROOT / "docs" / "tutorials" / "own-backbone.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 60
    (added,) = re.findall(r"^class (\w+)", code, re.MULTILINE)
    for folder in ("trainer", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    models = tmp_path / "trainer" / "models"
    (models / "scaled_bottom.py").write_text(code)
    (line,) = re.findall(r"`(\"\w+\": \"[\w.]+\")`", page)
    assert line == f'"scaled_bottom": "scaled_bottom.{added}"'
    registry = tmp_path / "trainer" / "config" / "backbones.py"
    replaced(registry, '"deepfm.DeepFM",\n', f'"deepfm.DeepFM",\n    {line},\n')
    copy = tmp_path / "tests" / "trainer" / "models" / "test_backbones.py"
    replaced(copy, "\nOWNING = {", '\nOWNING = {"scaled_bottom", ')
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(copy)]
    done = subprocess.run(
        [*command, "-k", "scaled_bottom and not parameter_count"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 10


# ---------------------------------------------------------------- two ranks


def add_label(data: Path, name: str) -> None:
    """Gives a prepared data set a further label: whether the event's time is even."""
    for file in data.glob("*/part-*.parquet"):
        table = pq.read_table(file)
        even = (table["timestamp"].to_numpy() % 2 == 0).astype(np.int8)
        pq.write_table(table.append_column(f"label_{name}", pa.array(even)), file)
    info = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(info | {"extra_labels": [name]}))


def ranked_config(name: str, data: Path, stores: Path, output: Path) -> RunConfig:
    """LLM4MSR around the backbone with two labels, with nothing random in it."""
    return make_config(
        data,
        stores,
        output,
        train__global_batch_size=640,
        data__labels='{"even": 0.5}',
        model__backbone=name,
        model__dropout=0.0,
        model__meta__noise=0.0,
        model__meta__dropout=0.0,
        model__meta__inputs='["user"]',
    )


def step_on_all_ranks(data: Path, stores: Path, root: Path) -> dict[str, list[float]]:
    """Loss on the validation split, of a step on the whole training split, and on the former after it.

    Last, the mean logit of the further label in that step.

    The first process to come leaves the initial state in a checkpoint; later ones begin with it.
    """
    found = {}
    with distributed(60) as runtime:
        for name in BACKBONES:
            config = ranked_config(name, data, stores, root / name)
            start = root / name / "checkpoints" / "step-00000000"
            first = not start.exists()
            dist.barrier()
            if first:
                prepare_folder(config, runtime, resume=False)
            run = build(config, runtime, root / name, open_inputs(config, runtime))
            if first:
                folder = start.parent
                CheckpointWriter(run, folder).save(LoopState())
            load_checkpoint(start, run)
            valid = run.stream(["valid"], shuffle=False)
            before = measure(run, valid).logloss
            run.model.train()
            train = run.stream(["train"], shuffle=False)
            assert train.steps == 1
            batch = run.pipeline.progress(iter(train.batches()))
            sums = torch.stack(
                [
                    F.binary_cross_entropy_with_logits(
                        batch.logits, batch.label, batch.weight, reduction="sum"
                    ),
                    batch.weight.sum(),
                    (batch.extra_logits[:, 0] * batch.weight).sum(),
                ]
            )
            dist.all_reduce(sums)
            loss, further_logit = (sums[0] / sums[1]).item(), (sums[2] / sums[1]).item()
            found[name] = [before, loss, measure(run, valid).logloss, further_logit]
    return found


@pytest.mark.distributed
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    data, stores = make_inputs(tmp_path / "inputs", users=80)
    add_label(data, "even")
    one = step_on_all_ranks(data, stores, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [
            *command,
            "-m",
            "tests.trainer.models.test_backbones",
            str(data),
            str(stores),
            str(tmp_path),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])
    for name in BACKBONES:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
        assert one[name][2] != one[name][0]


if __name__ == "__main__":
    outcome = step_on_all_ranks(*map(Path, sys.argv[1:4]))
    if os.environ["RANK"] == "0":
        print(json.dumps(outcome))
