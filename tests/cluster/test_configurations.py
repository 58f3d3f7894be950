"""The files in `cluster/` hold: Ray, KubeRay's schema, a shell and our own command line accept what they say."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from raymerge.cli import app
from raymerge.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws", "gcp")
TOKEN = "/home/ubuntu/.ray/auth_token"


def check_command(words: list[str]) -> None:
    """Words that our command line understands; nothing is run."""
    found = typer.main.get_command(app)
    assert isinstance(found, typer.core.TyperGroup)
    found.commands[words[0]].make_context(words[0], words[1:])


# Ray's cluster launcher


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = yaml.safe_load((CLUSTER / f"{request.param}.yaml").read_text())
    assert isinstance(found, dict)
    return found


def test_ray_accepts_a_launcher_file(launcher: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(launcher)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["head"]["max_workers"] == 0
    assert types["worker"]["min_workers"] == 0 < types["worker"]["max_workers"] <= prepared["max_workers"]


def test_a_launched_cluster_asks_for_a_token_and_shows_nothing(launcher: dict[str, Any]) -> None:
    starts = launcher["head_start_ray_commands"][-1], launcher["worker_start_ray_commands"][-1]
    for start in starts:
        assert "export RAY_AUTH_MODE=token; ray start" in start
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in yaml.safe_dump(launcher)
    # The token is a file of the user's, copied; without it `ray start` fails in this mode.
    assert launcher["file_mounts"][TOKEN] == "~/.ray/auth_token"
    assert f"chmod 600 {TOKEN}".replace("/home/ubuntu", "~") in launcher["setup_commands"]


def test_a_launcher_file_installs_what_is_tested(launcher: dict[str, Any]) -> None:
    mounts = dict(launcher["file_mounts"])
    del mounts[TOKEN]
    assert set(mounts.values()) == {"raymerge", "pyproject.toml", "README.md", "constraints.txt"}
    for remote, local in mounts.items():
        assert (ROOT / local).exists()
        assert remote == f"/home/ubuntu/source/{local}"
    (install,) = (command for command in launcher["setup_commands"] if "pip install" in command)
    assert "-c ~/source/constraints.txt ~/source " in install


def test_the_commands_of_a_launcher_file_are_shell(launcher: dict[str, Any]) -> None:
    for key, commands in launcher.items():
        for command in commands if key.endswith("_commands") else ():
            subprocess.run(["bash", "-n", "-c", command], check=True)


# KubeRay

# What may stand in a RayJob (ray.io/v1, KubeRay 1.5) as far as we use it, and what must; of Kubernetes' own fields
# only those that are there. https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
COUNT = {"type": "integer", "minimum": 0}
FLAG = {"type": "boolean"}
TEXT = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE])?$"}


def thing(required: tuple[str, ...] = (), /, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


QUANTITIES = {"type": "object", "additionalProperties": QUANTITY, "required": ["cpu", "memory"]}
CONTAINER = thing(
    ("name", "image", "resources", "securityContext"),
    name=NAME,
    image=TEXT,
    env={"type": "array"},
    envFrom={"type": "array"},
    securityContext={"type": "object"},
    resources=thing(("requests", "limits"), requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts={
        "type": "array",
        "items": thing(("name", "mountPath"), name=NAME, mountPath=TEXT, readOnly=FLAG),
    },
)
POD = thing(
    ("spec",),
    spec=thing(
        ("containers",),
        automountServiceAccountToken=FLAG,
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        volumes={
            "type": "array",
            "items": thing(("name", "configMap"), name=NAME, configMap=thing(("name",), name=NAME)),
        },
    ),
)
RAY_CLUSTER = thing(
    ("headGroupSpec",),
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    authOptions=thing(mode={"enum": ["token", "disabled"]}, secretName=NAME),
    headGroupSpec=thing(
        ("template", "rayStartParams"),
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=TEXTS,
        template=POD,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": thing(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
RAY_JOB = thing(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    # The names of a job's cluster and pods are made from it.
    metadata=thing(("name",), name={**NAME, "maxLength": 47}, namespace=NAME, labels=TEXTS),
    spec=thing(
        # The schema asks for a cluster or the choice of one; ours brings its own.
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        runtimeEnvYAML=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=RAY_CLUSTER,
    ),
)


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))


@pytest.fixture
def job(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[1]


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_the_ray_job_has_the_fields_of_its_schema(job: dict[str, Any]) -> None:
    jsonschema.validate(job, RAY_JOB)
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_ray_job_keeps_its_doors_closed(job: dict[str, Any]) -> None:
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in pods(job):
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["runAsNonRoot"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            # Keys come from a Secret, by its name.
            assert "env" not in container
            assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["raymerge-s3"]


def test_the_ray_job_runs_a_recipe_that_is_there(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    recipe, job = documents
    assert (recipe["apiVersion"], recipe["kind"]) == ("v1", "ConfigMap")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "raymerge"]
    check_command(words[3:])
    path = Path(words[4])
    head = next(pods(job))
    (mount,) = head["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == str(path.parent)
    (volume,) = head["volumes"]
    assert (volume["name"], volume["configMap"]["name"]) == (mount["name"], recipe["metadata"]["name"])
    (tmp_path / path.name).write_text(recipe["data"][path.name])
    assert load_recipe(tmp_path / path.name).method == "ties"


def test_the_ray_of_kubernetes_is_the_one_that_is_tested(job: dict[str, Any]) -> None:
    found = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == found[1]
    assert f"\nFROM rayproject/ray:{found[1]}-py" in (CLUSTER / "Dockerfile").read_text()


# All of them


def test_scripts_pass_shellcheck() -> None:
    found = shutil.which("shellcheck")
    if found is None:
        pytest.skip("there is no shellcheck here")
    subprocess.run([found, *CLUSTER.glob("*.sh")], check=True)


def test_each_file_has_its_command_in_the_readme() -> None:
    text = (CLUSTER / "README.md").read_text()
    blocks = dict(re.findall(r"<!-- (\w+) -->\n```bash\n(.+?)\n```", text, re.DOTALL))
    assert set(blocks) == {"launcher", "kuberay", "slurm", "machines"}
    for file in CLUSTER.iterdir():
        assert file.name in text or file.name == "README.md", file.name
    for block in blocks.values():
        for file in re.findall(r"cluster/[\w.]+", block):
            assert (ROOT / file).is_file()
    check_command(shlex.split(blocks["slurm"].partition("slurm.sh ")[2]))
    check_command(shlex.split(blocks["launcher"].partition("raymerge ")[2].rstrip('"')))


def test_no_file_holds_a_secret() -> None:
    keys = r"AKIA[0-9A-Z]{16}|-----BEGIN|(KEY|SECRET|TOKEN|PASSWORD)\w*\s*[:=]\s*['\"]?[\w/+]{16,}|kind: Secret"
    for file in CLUSTER.iterdir():
        assert not re.search(keys, file.read_text()), file.name
