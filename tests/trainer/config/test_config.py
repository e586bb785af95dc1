"""Configuration: what is refused, and what the message says."""

import copy
from pathlib import Path

import pytest
import yaml

from llm_knowledge.errors import InputError
from trainer.config.run import RunConfig, load_config, parse_overrides, save_config

MINIMAL = ["name=a", "output=o", "data.path=d"]


def test_defaults_and_overrides() -> None:
    config = load_config(None, [*MINIMAL, "train.seed=7", "model.hidden=[4, 2]"])
    assert config.train.seed == 7
    assert config.model.hidden == [4, 2]
    assert config.model.backbone == "star"


def test_file_then_overrides_then_saved_whole(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\noutput: o\ndata: {path: d}\ntrain: {epochs: 3, seed: 1}\n")
    config = load_config(file, ["train.seed=2"])
    assert (config.train.epochs, config.train.seed) == (3, 2)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert saved.keys() == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.sede=1"], r"train\.sede: no such field; did you mean seed\?"),
        (["model.meta.rnak=1"], r"model\.meta\.rnak: no such field; did you mean rank\?"),
        (["trian.seed=1"], r"trian: no such field; did you mean train\?"),
        (["train.seed=one"], r"train\.seed: .*integer.*'one'"),
        (["train.seed=1.5"], r"train\.seed: .*1\.5"),
        (["train.epochs=0"], r"train\.epochs: .*greater than or equal to 1.*0"),
        (["train.learning_rate=fast"], r"train\.learning_rate"),
        (["model.backbone=cgc"], r"model\.backbone: .*'shared_bottom', .*'star'.*'cgc'"),
        (
            ["tables.ids=zero_collision"],
            r"tables: ids = zero_collision needs zero_collision.user_rows",
        ),
        (
            ["tables.zero_collision.admission=2"],
            r"tables: zero_collision would be ignored by ids = vocabulary",
        ),
        (
            [
                "tables.ids=zero_collision",
                "tables.zero_collision={user_rows: 9, item_rows: 9}",
                "hardware.sharding_group_size=2",
            ],
            r"sharding_group_size: groups would give the same row to different ids",
        ),
        (["tables.ids=hash"], r"tables: hash_rows belongs to ids = hash"),
        (["tables.optimizer=adamw"], r"tables\.optimizer: .*rowwise_adagrad.*'adamw'"),
        (["tables.dim=10"], r"tables\.dim: .*multiple of 4"),
        (["data.path=null"], r"data\.path"),
        (["knowledge.user=store"], r"knowledge\.user is given but model\.meta\.enabled is false"),
        (["model.meta.enabled=true"], r"knowledge\.user must name a store"),
        (
            [
                "model.meta.enabled=true",
                "knowledge.user=u",
                "knowledge.scenario=s",
                "knowledge.item=i",
            ],
            r"knowledge\.item is given but nothing in model\.meta uses it",
        ),
        (["data.train_splits=[training]"], r"data\.train_splits\.0: .*'training'"),
        (["name=a b"], r"name: "),
    ],
)
def test_refusals_name_field_value_and_remedy(changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(None, [*MINIMAL, *changes])


def test_missing_fields_are_listed_together() -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, [])
    assert all(
        field in str(caught.value)
        for field in ("name: required", "output: required", "data: required")
    )


@pytest.mark.parametrize("assignment", ["seed", "=1", "a..b=1", "a.=2", "a=[1"])
def test_malformed_overrides(assignment: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_overrides([assignment])


def test_changes_in_python_are_those_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\noutput: o\ndata: {path: d}\ntrain: {epochs: 3, seed: 1}\n")
    changes = {
        "output": tmp_path / "new",
        "train": {"seed": 2},
        "train.guard.rollbacks": 5,
        "model.hidden": [4, 2],
    }
    before = copy.deepcopy(changes)
    config = load_config(str(file), changes)
    words = ["train.seed=2", "train.guard.rollbacks=5", "model.hidden=[4, 2]"]
    assert config == load_config(file, [f"output={tmp_path / 'new'}", *words])
    assert (config.train.epochs, config.train.seed, config.train.guard.rollbacks) == (3, 2, 5)
    assert changes == before  # the caller's own objects stay as they were


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.epochs": "two"}, r"run\.yaml: train\.epochs: .*integer.*'two'"),
        ({"train.sede": 1}, r"train\.sede: no such field; did you mean seed\?"),
        ({"train..seed": 1}, r"changes\['train\.\.seed'\]: write the key as section\.field"),
        ({7: 1}, r"changes\[7\]: write the key as section\.field"),
        ({"train": 1, "train.seed": 1}, r"changes\['train\.seed'\]: train was set to a value"),
    ],
)
def test_wrong_changes_in_python_are_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\noutput: o\ndata: {path: d}\n")
    with pytest.raises(InputError, match=message):
        load_config(file, changes)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_config(broken)
    broken.write_text("- a")
    with pytest.raises(InputError, match="mapping of sections"):
        load_config(broken)


def test_no_python_objects_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_config(file)


@pytest.mark.parametrize("text", ["[" * 2_000, "name: 2020-13-45", "a: [", "name: \x00"])
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(InputError, match="--set"):
        load_config(None, [f"name={'[' * 2_000}"])


@pytest.mark.parametrize(
    "name", ["1e3", "1_000", "0x1F", "on", "NO", "2024-01-01", "null", "010", ".5"]
)
def test_a_saved_configuration_reads_as_it_was(tmp_path: Path, name: str) -> None:
    config = RunConfig(name=name, output="runs/x", data={"path": "data"})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
