"""Kubernetes manifests fit the published schemas, in which an unknown field is an error.

The schemas are the CRDs of volcano-sh/volcano (ed72c7c8, config/crd/volcano/bases/batch.volcano.sh_jobs.yaml)
and kubernetes-sigs/jobset (08dfbdfd, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml), both under
the Apache License 2.0, without descriptions and without rules that are no JSON schema.
"""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launch.main import main
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, write_config

pytest.importorskip("torchx")
pytest.importorskip("kubernetes")
DOCKERFILE = ROOT / "launch/Dockerfile"


def strict(schema: Any) -> Any:
    """The schema as the API server reads it: unknown fields refused, int-or-string, nullable."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict_schema = {key: strict(value) for key, value in schema.items()}
    if strict_schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(strict_schema.get("properties"), dict) and strict_schema.get("type") == "object":
        keeps = strict_schema.get("x-kubernetes-preserve-unknown-fields", False)
        strict_schema.setdefault("additionalProperties", keeps)
    if strict_schema.get("nullable") and isinstance(strict_schema.get("type"), str):
        strict_schema["type"] = [strict_schema["type"], "null"]
    return strict_schema


def check(name: str, document: Any) -> None:
    packed = (ROOT / f"tests/schemas/{name}.json.gz").read_bytes()
    schema = strict(json.loads(gzip.decompress(packed)))
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, not the CRD's
    jsonschema.Draft202012Validator(schema).validate(document)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kubernetes")
    return write_config(
        make_config(root / "data", None, root / "run", data__streams=32), root / "config.yaml"
    )


def dryrun(
    capsys: pytest.CaptureFixture,
    config: Path,
    scheduler: str,
    *words: str,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    command = ["launch", "train", "--scheduler", scheduler, "--image", "registry/llm4msr:cuda"]
    command += ["--cfg", "queue=research", "--resource", "h100x8", "--set", "retries=2"]
    command += [
        "--set",
        "mounts=['type=bind,src=/fast,dst=/fast', 'type=volume,src=runs,dst=/runs']",
    ]
    of_stage = ["--config", str(config), *arguments]
    assert main([*command, *words, "--dryrun", "--", *of_stage]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("hosts", ["1x8", "4x8", "2:4x8"])
def test_volcano_manifest(config: Path, capsys: pytest.CaptureFixture, hosts: str) -> None:
    document = dryrun(capsys, config, "kubernetes", "-j", hosts)
    check("volcano-job", document)
    tasks = document["spec"]["tasks"]
    assert len(tasks) == int(hosts[-3])
    assert sum(task["minAvailable"] for task in tasks) == int(hosts[0])
    assert document["spec"]["queue"] == "research"


@pytest.mark.parametrize("hosts", ["1x8", "4x8"])
def test_jobset_manifest(config: Path, capsys: pytest.CaptureFixture, hosts: str) -> None:
    document = dryrun(
        capsys, config, "jobset", "-j", hosts, "--cfg", "namespace=team", "--set", "port=29400"
    )
    check("jobset", document)
    name = document["metadata"]["name"]
    assert document["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert document["spec"]["failurePolicy"] == {"maxRestarts": 2}
    [job] = document["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["completions"] == int(hosts[0])
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["LLM4MSR_FIRST_HOST"] == f"{name}-hosts-0-0.{name}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    if hosts == "4x8":
        # Kubernetes makes one dollar of two.
        assert "host=$${LLM4MSR_FIRST_HOST:=localhost};" in container["command"][2]
        assert '--rdzv-endpoint "$$host:29400"' in container["command"][2]


@pytest.mark.parametrize(
    ("scheduler", "schema"), [("kubernetes", "volcano-job"), ("jobset", "jobset")]
)
def test_secrets_are_references_and_dollars_of_arguments_stay(
    config: Path, capsys: pytest.CaptureFixture, scheduler: str, schema: str
) -> None:
    secret = ["--set", "secrets.WANDB_API_KEY=tracking/key"]
    document = dryrun(
        capsys, config, scheduler, *secret, arguments=["--set", "output=x$(WANDB_API_KEY)$$y"]
    )
    check(schema, document)
    spec = document["spec"]
    if scheduler == "jobset":
        pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    else:
        pod = spec["tasks"][0]["template"]["spec"]
    [container] = pod["containers"]
    assert container["env"][-1] == {
        "name": "WANDB_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "tracking", "key": "key"}},
    }
    assert "'output=x$$(WANDB_API_KEY)$$$$y'" in container["command"][2]


@pytest.mark.parametrize("name", ["volcano-job", "jobset"])
def test_schemas_refuse_what_is_wrong(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="maxRetires"):
        check(name, {"spec": {"maxRetires": 3}})
    with pytest.raises(jsonschema.ValidationError):
        check(name, {"spec": {"tasks": "two", "replicatedJobs": "two"}})


def test_bad_jobsets_are_refused(config: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["launch", "train", "--scheduler", "jobset", "--image", "x"]
    stage = ["--", "--config", str(config)]
    assert main([*command, *stage]) == 2
    assert "pipe into kubectl create" in capsys.readouterr().err
    assert main([*command, "--cfg", "que=x", "--dryrun", *stage]) == 2
    assert "options.que: jobset has no such option" in capsys.readouterr().err


def test_dockerfile_passes_the_linter_and_leaves_torchx_out(tmp_path: Path) -> None:
    tool = Path(sys.executable).parent / "hadolint"
    if not tool.exists():
        pytest.skip("hadolint is missing")
    done = subprocess.run([tool, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = DOCKERFILE.read_text()
    for source in re.findall(r"^COPY ((?:\S+ )+)\S+$", text, re.MULTILINE):
        assert all((ROOT / path).exists() for path in source.split())
    [expression] = re.findall(r"sed -i -E '([^']+)'", text)
    common = tmp_path / "common.txt"
    common.write_text((ROOT / "requirements/common.txt").read_text())
    subprocess.run(["sed", "-i", "-E", expression, common], check=True)
    left = common.read_text()
    assert not re.search(r"^(torchx|kubernetes|urllib3)==", left, re.MULTILINE)
    assert re.search(r"^transformers==", left, re.MULTILINE)
