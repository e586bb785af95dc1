"""The report: self-contained, safe with hostile text, honest about what it leaves out."""

import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from llm_knowledge.errors import InputError
from tests.helpers.evaluation_data import make_dataset, make_run, noisy_truth, read_split
from trainer.evaluation.compare import compare
from trainer.evaluation.metrics import write_evaluation
from trainer.report.figures import read_curve
from trainer.report.knowledge import tell_stories
from trainer.report.page import embed_json, knowledge_pairs, load_arms, write_report

EVIL = "<script>alert(1)</script>"


def make_store(path, level, keys, prompts, dim=8, seed=0):
    from llm_knowledge.store.manifest import Cutoff, Manifest, ModelInfo, TemplateInfo
    from llm_knowledge.store.writer import write_store

    vectors = np.random.default_rng(seed).normal(size=(len(keys), dim)).astype(np.float32)
    manifest = Manifest(
        level=level,
        complete=True,
        model=ModelInfo(name="fake", weights_hash="0", max_tokens=64),
        template=TemplateInfo(name="t", version=1, hash="0"),
        pooling="mean",
        layer=-1,
        dim=dim,
        dtype="float32",
        key_type="int64" if isinstance(keys[0], int) else "string",
        rows=len(keys),
        cutoff=Cutoff(kind="none"),
        input_fingerprint="0",
        normalized=False,
    )
    write_store(path, manifest, keys, vectors, prompts)
    return vectors


@pytest.fixture
def world(tmp_path):
    """Two arms with two seeds each, stores, and a hostile item title and prompt."""
    data = make_dataset(tmp_path / "data", titles=[f"{EVIL} & part {i} $x$" for i in range(30)])
    users = list(range(40))
    prompts = [f"User {u} liked:\n- {EVIL}\n- film {u}" for u in users]
    make_store(tmp_path / "users", "user", users, prompts)
    make_store(tmp_path / "scenarios", "scenario", ["comedy", "drama"], ["laugh", "cry"])
    stores = {"user": str(tmp_path / "users"), "scenario": str(tmp_path / "scenarios")}
    runs = []
    for name, noise, knowledge in (("star", 1.5, None), ("star+llm4msr", 0.5, stores)):
        for seed in range(2):
            predict = noisy_truth(data, noise, seed)
            runs.append(make_run(tmp_path / f"{name}-{seed}", data, predict, name, seed, knowledge))
    return tmp_path, data, runs


def numbers(html):
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', html, re.S)
    return json.loads(found.group(1))


@pytest.mark.slow
def test_full_report(world):
    root, _, runs = world
    result = compare([("star", runs[:2]), ("star+llm4msr", runs[2:])], samples=100)
    out = write_report(runs, root / "out", result)
    assert out == root / "out" / "report.html"
    html = out.read_text()
    assert html.count("<script") == 1  # the numbers; no title became an element
    assert EVIL not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert not re.search(r'(src|href)=(?!"data:)|https?://|@import|url[(]', html)
    assert html.count("data:image/png;base64,") == 3  # differences, curves, map
    for words in (
        "Comedy nights",
        "Largest improvement",
        "Median",
        "Largest loss",
        "Knowledge map",
    ):
        assert words in html
    embedded = numbers(html)
    assert embedded["comparisons"] == [result]
    assert [arm["name"] for arm in embedded["arms"]] == ["star", "star+llm4msr"]
    aucs = [write_evaluation(run)["overall"]["auc"] for run in runs[:2]]
    assert f"{np.mean(aucs):.4f}" in html
    assert f"± {np.std(aucs, ddof=1):.4f}" in html
    row = result["table"][0]
    assert f"star+llm4msr is better than star: AUC {row['value']:.4f}" in html


@pytest.mark.slow
def test_insignificant_difference_is_said_plainly(world):
    root, data, runs = world
    same = [
        make_run(root / f"twin-{s}", data, noisy_truth(data, 1.5, 40 + s), "twin", s)
        for s in range(2)
    ]
    result = compare([("star", runs[:2]), ("twin", same)], samples=100)
    assert result["table"][0]["verdict"] == "no significant difference"
    html = write_report([*runs[:2], *same], root / "r.html", [result]).read_text()
    assert "twin is not significantly different from star" in html


def test_stories_are_the_best_the_median_and_the_worst_user(world):
    from trainer.evaluation.predictions import read_run

    _, data, runs = world
    stories = tell_stories([read_run(r) for r in runs[:2]], [read_run(r) for r in runs[2:]])
    table = read_split(data, "test")
    user, label = np.asarray(table["user_id"]), np.asarray(table["label"])
    losses = []
    for arm in (runs[:2], runs[2:]):
        total = 0
        for run in arm:
            frame = read_split(run / "predictions", "test").sort_by("timestamp")
            total = total + np.asarray(frame["prediction"], np.float64)
        p = total / 2
        losses.append(-np.log(np.where(label == 1, p, 1 - p)))
    known = [u for u in range(40) if u % 4 != 3]
    change = {u: (losses[0] - losses[1])[user == u].mean() for u in known}
    ranked = sorted(known, key=change.get, reverse=True)
    assert [s["user"] for s in stories] == [ranked[0], ranked[15], ranked[-1]]
    for story in stories:
        assert story["change"] == pytest.approx(change[story["user"]])
        assert story["prompt"].startswith(f"User {story['user']} liked")
        assert len(story["rows"]) == 10 < story["impressions"]
        assert story["user"] not in [n["user"] for n in story["neighbours"]]
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors[ranked[0]]
    expected = [u for u in np.argsort(-cosine).tolist() if u != ranked[0]][:3]
    assert [n["user"] for n in stories[0]["neighbours"]] == expected


def test_one_arm_without_knowledge_and_without_curves(tmp_path):
    data = make_dataset(tmp_path / "data")
    predict = noisy_truth(data, 1, 0)
    run = make_run(tmp_path / "run", data, predict, curves=False)
    html = write_report([run], tmp_path / "report.html").read_text()
    assert "No run wrote training curves" in html
    assert "No arm with knowledge" in html
    assert numbers(html)["comparisons"] == []


def test_missing_store_is_said(world):
    root, _, runs = world
    (root / "users").rename(root / "moved")
    html = write_report(runs, root / "report.html").read_text()
    assert "is not there any more: no map" in html
    assert "Largest improvement" in html


@pytest.mark.slow
def test_damaged_store_is_an_input_error_and_the_old_report_stays(world):
    root, _, runs = world
    old = write_report(runs, root / "report.html").read_text()
    next((root / "users").glob("part-*.parquet")).unlink()
    with pytest.raises(InputError, match=r"part-00000.parquet: the part is missing"):
        write_report(runs, root / "report.html")
    assert (root / "report.html").read_text() == old


@pytest.mark.slow
def test_outdated_evaluation_is_computed_again(world):
    root, data, runs = world
    write_evaluation(runs[0])
    make_run(runs[0], data, noisy_truth(data, 0.1, 7), "star", 0)
    html = write_report([runs[0]], root / "report.html").read_text()
    fresh = write_evaluation(runs[0])["overall"]["auc"]
    assert numbers(html)["arms"][0]["evaluations"][0]["overall"]["auc"] == fresh


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 20_000,
        '{"overall": {}, "scenarios": {}, "segments": {}}',
        '{"overall": null, "scenarios": [], "segments": 3}',
        "a block without a metric",
        "a number that is text",
        "a dataset that is text",
    ],
)
def test_a_broken_evaluation_is_computed_again(world, text):
    root, _, runs = world
    right = write_evaluation(runs[0])
    broken = json.loads(json.dumps(right))
    if text.startswith("a block"):
        del broken["segments"]["known"]["gauc"]
    elif text.startswith("a number"):
        broken["scenarios"]["drama"]["auc"] = ".7"
    elif text.startswith("a dataset"):
        broken["dataset"] = "tiny"
    else:
        broken = None
    (runs[0] / "evaluation.json").write_text(text if broken is None else json.dumps(broken))
    html = write_report([runs[0]], root / "report.html").read_text()
    (evaluation,) = numbers(html)["arms"][0]["evaluations"]
    for section in ("scenarios", "segments"):
        assert evaluation[section].keys() == right[section].keys()
        for key, block in right[section].items():
            assert evaluation[section][key]["auc"] == block["auc"]
    assert evaluation["dataset"] == right["dataset"]


@pytest.mark.parametrize("change", [{"model": [1]}, {"knowledge": "x"}, {"data": 3}])
def test_a_broken_configuration_is_an_input_error(world, change):
    root, _, runs = world
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config | change))
    with pytest.raises(InputError, match=r"config.yaml: .*not readable"):
        write_report([runs[0]], root / "report.html")


def test_a_pipe_in_place_of_predictions_is_not_waited_for(world):
    root, _, runs = world
    part = runs[0] / "predictions/test/part-00001.parquet"
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(InputError, match="is no regular file"):
        write_report([runs[0]], root / "report.html")


def test_runs_of_two_datasets_are_refused(world):
    root, _, runs = world
    other = make_dataset(root / "other", users=50)
    run = make_run(root / "stranger", other, noisy_truth(other, 1, 0), "star", 9)
    with pytest.raises(InputError, match=r"stranger: evaluated on another dataset"):
        write_report([*runs, run], root / "report.html")


@pytest.mark.slow
def test_a_store_says_that_it_is_a_control_and_the_name_of_a_run_does_not(world):
    from llm_knowledge.store.compress import compress
    from llm_knowledge.store.writer import shuffled_store

    root, data, runs = world
    for kind in ("shuffled", "random", "constant"):
        shuffled_store(root / "users", root / kind, 0, kind)
    compress(root / "shuffled", root / "small", 4)
    named = {"star+zero_collision": "users", "star+control_group": "users", "star+a": "shuffled"}
    named |= {"star+b": "random", "star+c": "constant", "star+d": "small"}
    for name, store in named.items():
        stores = {"user": str(root / store), "scenario": str(root / "scenarios")}
        made = make_run(root / name, data, noisy_truth(data, 1, 0), name, 0, stores)
        (arm,) = load_arms([made])
        assert arm.is_control == (store != "users"), name
    html = write_report([*runs[:2], root / "star+a", root / "star+zero_collision"], root / "r.html")
    assert "Largest improvement" in html.read_text()


def test_controls_are_not_paired():
    class Fake:
        def __init__(self, name, backbone, uses_knowledge, is_control=False):
            self.name, self.backbone = name, backbone
            self.uses_knowledge, self.is_control = uses_knowledge, is_control

    shuffled, real = Fake("star+shuffled", "star", True, True), Fake("star+x", "star", True)
    star, bottom = Fake("star", "star", False), Fake("sb", "shared_bottom", False)
    assert knowledge_pairs([shuffled, star, bottom, real]) == [(star, real)]


def test_characters_that_steer_a_screen_are_shown_and_not_obeyed(world):
    root, data, runs = world
    steering = "a\x00b\x1b[31mc\u202ed\u2066e\x9bf"
    items = pq.read_table(data / "items.parquet")
    titles = pa.array([f"{steering} é‍✓ {n}" for n in range(items.num_rows)])
    pq.write_table(items.set_column(1, "title", titles), data / "items.parquet")
    facts = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(facts | {"name": steering}))
    html = write_report(runs, root / "report.html").read_text()
    assert not set(html) & set("\x00\x1b\u202e\u2066\x9b")
    assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde\ufffdf é‍✓" in html
    assert "a\ufffdb" in html.split("<title>")[1].split("</title>")[0]


def test_embedded_json_cannot_leave_its_element():
    value = {"a": f"</script>{EVIL}&\u2028"}
    text = embed_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


def test_curves_survive_a_cut_line_and_keep_the_resumed_value(tmp_path):
    lines = ['{"step": 1, "kind": "train", "loss": 5}', '{"step": 1, "kind": "train", "loss": 2}']
    lines += [
        '{"step": 2, "kind": "train", "loss": NaN}',
        '{"step": 3, "kind": "valid", "loss": 1}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "ki')
    steps, values = read_curve(tmp_path, "loss", ("train",))
    assert (steps.tolist(), values.tolist()) == ([1], [2.0])


def test_report_cannot_be_written(world):
    root, _, runs = world
    (root / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(runs[:1], root / "file" / "report.html")


def test_item_titles_come_from_the_catalogue(world):
    _, data, _ = world
    assert EVIL in pq.read_table(data / "items.parquet")["title"][0].as_py()
