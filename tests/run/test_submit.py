"""A command as a job: what is packed, what is refused before anything is sent, and real jobs on a real head."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import COMMAND, ROOT, environment, raymerge
from head import SECONDS, Head, free_ports, started_head, wait_for
from tiny import make_llama, weights

from raymerge import api
from raymerge.errors import RayMergeError, RecipeError, UserError
from raymerge.run import submit

slow = pytest.mark.slow
SECRET = "hunter2-never-to-be-seen"

# A private method: linear, and as slow as its setting says. It writes down where RayMerge was imported from.
NOTING = """
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raymerge
from raymerge.methods.linear import Linear

@dataclass(frozen=True, kw_only=True, slots=True)
class Noting(Linear):
    seconds: float = 0.0
    note: str = ""

    def merge(self, base: Any, experts: Any, *more: Any) -> Any:
        Path(self.note).write_text(raymerge.__file__)
        time.sleep(self.seconds)
        return Linear.merge(self, base, experts, *more)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe of absolute checkpoints and relative data."""
    monkeypatch.chdir(tmp_path)
    shared = tmp_path / "shared"
    for seed, name in ((0, "base"), (1, "a"), (2, "b")):
        make_llama(shared / name, seed)
    for name in ("data/rows.jsonl", "data/more/x.jsonl", "unused.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "w1 w2 w3"}\n' * 4)
    (tmp_path / "noting_method.py").write_text(NOTING)
    write(
        tmp_path / "recipe.yml",
        base=str(shared / "base"),
        experts={"a": {"path": str(shared / "a"), "calibration": "data/more"}, "b": str(shared / "b")},
        method="linear",
        output={"shard_size": 8000},
        evaluate=[
            {"task": "t", "expert": "a", "kind": "perplexity", "data": "data/rows.jsonl"},
            {"task": "u", "kind": "perplexity", "data": str(tmp_path / "unused.jsonl")},
        ],
    )
    return tmp_path


def write(path: Path, **content: Any) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def change(path: Path, **changes: Any) -> None:
    write(path, **{**yaml.safe_load(path.read_text()), **changes})


def packed(place: Path, name: str = "recipe.yml") -> list[str]:
    folder = place / "packed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    submit.pack(Path(name), folder)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_recipe_and_what_it_names_by_relative_paths_are_packed(place: Path) -> None:
    assert packed(place) == ["data/more/x.jsonl", "data/rows.jsonl", "recipe.yml"]
    change(place / "recipe.yml", method="noting_method:Noting", evaluate=[])
    assert packed(place) == ["data/more/x.jsonl", "noting_method.py", "recipe.yml"]
    tasks = [{"task": "t", "kind": "perplexity", "data": "data/rows.jsonl"}]
    change(place / "recipe.yml", method="linear", search={"evaluate": tasks})
    assert packed(place, str(place / "recipe.yml")) == ["data/more/x.jsonl", "data/rows.jsonl", "recipe.yml"]
    space = {"method": {"choices": ["linear", "noting_method:Noting"]}}
    change(place / "recipe.yml", search={"space": space, "evaluate": []})
    assert packed(place) == ["data/more/x.jsonl", "noting_method.py", "recipe.yml"]


def test_a_recipe_of_mergekit_is_packed(place: Path) -> None:
    models = [{"model": str(place / "shared" / name), "parameters": {"weight": 0.5}} for name in ("a", "b")]
    write(place / "mergekit.yml", merge_method="linear", models=models, dtype="float32")
    assert packed(place, "mergekit.yml") == ["mergekit.yml"]


@pytest.mark.parametrize("where", ["base", "experts.b"])
@pytest.mark.parametrize("path", ["shared/a", "./nowhere", "~/a"])
def test_checkpoints_of_this_machine_are_refused(place: Path, where: str, path: str) -> None:
    content = yaml.safe_load((place / "recipe.yml").read_text())
    part = content if where == "base" else content["experts"]
    part[where.rpartition(".")[2]] = path
    write(place / "recipe.yml", **content)
    with pytest.raises(RecipeError, match=rf"recipe.yml: {where}: {path} is a folder of this machine; give"):
        packed(place)


def test_checkpoints_of_the_hub_and_of_object_storage_stay(place: Path) -> None:
    experts = {"a": "org/model@main", "b": "s3://bucket/b"}
    change(place / "recipe.yml", base="gs://bucket/base", experts=experts, evaluate=[])
    assert packed(place) == ["recipe.yml"]


def test_data_above_the_folder_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(place / "recipe.yml", evaluate=[{"task": "t", "kind": "perplexity", "data": "../unused.jsonl"}])
    monkeypatch.chdir(place / "data")
    with pytest.raises(RecipeError, match="unused.jsonl is not below this folder"):
        packed(place, "../recipe.yml")


def test_too_much_data_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "MOST_BYTES", 10)
    with pytest.raises(RecipeError, match="put data on storage that all nodes share"):
        packed(place)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merge", "recipe.yml", "out"), "out: would lie in the folder of the job"),
        (("evaluate", "shared/a", "recipe.yml"), "MODEL: shared/a is a folder of this machine"),
        (("merge", "wrong.yml", "/out"), "did you mean 'ties'?"),
        (("merge", "recipe.yml", "/out", "--wrkers", "2"), "No such option: --wrkers"),
        (("merg", "recipe.yml", "/out"), "did you mean 'merge'?"),
        (("submit", "merge"), "'submit' is no command"),
    ],
)
def test_mistakes_end_here(place: Path, arguments: tuple[str, ...], said: str) -> None:
    """No cluster is asked: there is none."""
    write(place / "wrong.yml", **{**yaml.safe_load((place / "recipe.yml").read_text()), "method": "tie"})
    found = raymerge("submit", *arguments, "--address", "http://127.0.0.1:1", cwd=place)
    assert found.returncode == 2 and said in found.stderr
    assert "Traceback" not in found.stderr


class Stranger(BaseHTTPRequestHandler):
    """Something else that listens: says yes to all, or that there is nothing."""

    def do_GET(self) -> None:  # noqa: N802
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("status", [200, 404, 500])
def test_an_address_that_is_no_dashboard(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    server.status = status  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(RayMergeError, match=r"no dashboard of Ray; is it the head's address"):
        submit.submit(f"http://127.0.0.1:{server.server_port}", "methods", [], {})
    server.shutdown()
    server.server_close()


def test_an_address_where_nobody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(RayMergeError, match="no dashboard of Ray.*\n.*Failed to connect"):
        submit.submit(f"http://127.0.0.1:{free_ports(1)[0]}", "methods", [], {})
    with pytest.raises(UserError, match="a dashboard's is expected, as http://HEAD:8265"):
        submit.submit("head:6379", "methods", [], {})


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One for all tests; the cluster has credentials of its own."""
    with started_head(AWS_SECRET_ACCESS_KEY=SECRET) as found:
        yield found


def ours(head: Head, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`raymerge submit` to the head, by someone who has the same secret in the environment."""
    command = [*COMMAND, "submit", *map(str, arguments), "--address", head.address]
    variables = environment(AWS_SECRET_ACCESS_KEY=SECRET, HF_TOKEN=SECRET, **{**head.environment, **more})
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False)


@slow
def test_a_job_gives_the_bytes_of_a_local_merge_and_shows_its_log(place: Path, head: Head) -> None:
    """By this RayMerge, whichever is installed there; and the secrets of both sides are nowhere."""
    change(place / "recipe.yml", method="noting_method:Noting", settings={"note": str(place / "note")}, evaluate=[])
    found = ours(head, "merge", "recipe.yml", place / "out", "--workers", "2")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{place}/out: noting_method:Noting of 3 checkpoints" in found.stdout
    assert "py_modules_files" in (place / "note").read_text()
    api.merge(place / "recipe.yml", place / "local", local=True)
    assert weights(place / "out") == weights(place / "local") != {}
    job = head.jobs()[-1]
    assert f"{job} on {head.address}" in found.stderr
    assert raymerge("report", place / "out").returncode == 0
    written = [path for folder in (place / "out", head.folder) for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "report.html", f"job-driver-{job}.log"} <= {path.name for path in written}
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert SECRET not in found.stdout + found.stderr + json.dumps(head.job(job)) + head.log(job)


@slow
def test_a_mistake_that_only_the_cluster_sees(place: Path, head: Head) -> None:
    change(place / "recipe.yml", base="/nowhere/base")
    found = ours(head, "merge", "recipe.yml", place / "out")
    assert found.returncode == 2
    assert "CheckpointError: /nowhere/base: no such folder" in found.stdout
    assert f"{head.jobs()[-1]} ended with exit code 2" in found.stderr and "Error" not in found.stderr


@slow
def test_detached_and_measured(place: Path, head: Head) -> None:
    """Only the id is printed; relative data has come along."""
    found = ours(head, "evaluate", place / "shared" / "a", place / "recipe.yml", "--json", "--detach")
    assert (found.returncode, found.stderr) == (0, "")
    job = found.stdout.strip()
    assert head.job(job)["status"] in ("PENDING", "RUNNING")
    assert head.ended(job)["status"] == "SUCCEEDED", head.log(job)
    assert '"perplexity"' in head.log(job)


@slow
@pytest.mark.parametrize("end", ["ctrl-c", "stop"])
def test_a_job_that_is_left_goes_on_and_one_that_is_stopped_says_so(place: Path, head: Head, end: str) -> None:
    settings = {"note": str(place / "note"), "seconds": 0.5}
    change(place / "recipe.yml", method="noting_method:Noting", settings=settings, evaluate=[])
    command = [*COMMAND, "submit", "merge", "recipe.yml", str(place / "out"), "--address", head.address]
    variables = environment(**head.environment)
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        wait_for((place / "note").exists)
        job = head.jobs()[-1]
        if end == "ctrl-c":
            client.send_signal(signal.SIGINT)
        else:
            ray(head, "job", "stop", job)
        _, said = client.communicate(timeout=SECONDS)
    if end == "ctrl-c":
        assert client.returncode == 130 and not (place / "out").exists()
        assert f"{job} goes on" in said
        assert f"ray job logs {job} --follow --address {head.address}" in said
        assert f"ray job stop {job} --address {head.address}" in said
        assert head.ended(job)["status"] == "SUCCEEDED", head.log(job)
        assert (place / "out").exists()
    else:
        assert client.returncode == 1 and f"RayMergeError: {job}: Job was intentionally stopped" in said
        assert not (place / "out").exists()


@slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RAY_AUTH_TOKEN": "a-wrong-token-0123456789abcdef"}, "Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
    ],
)
def test_without_the_token_nothing_is_done(place: Path, head: Head, variables: dict[str, str], said: str) -> None:
    before = head.jobs()
    found = ours(head, "merge", "recipe.yml", place / "out", **variables)
    assert found.returncode == 1 and said in found.stderr and "RAY_AUTH_TOKEN_PATH" in found.stderr
    assert found.stderr.count("\n") == 1 and "a-wrong-token" not in found.stderr
    assert head.jobs() == before


def ray(head: Head, *arguments: str) -> str:
    """Ray's own command."""
    command = [str(Path(sys.executable).parent / "ray"), *arguments]
    variables = environment(RAY_API_SERVER_ADDRESS=head.address, **head.environment)
    found = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def script(head: Head, name: str, *arguments: str | Path) -> str:
    """What a script of jobs/ prints as a job, sent by Ray's own command."""
    return ray(head, "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{name}.py", *map(str, arguments))


@slow
def test_the_scripts_run_as_jobs(place: Path, head: Head) -> None:
    assert f"{place}/out: " in script(head, "merge", place / "recipe.yml", place / "out")
    change(place / "recipe.yml", evaluate=[{"task": "u", "kind": "perplexity", "data": str(place / "unused.jsonl")}])
    assert '"perplexity"' in script(head, "evaluate", place / "out", place / "recipe.yml")


@slow
def test_the_script_of_a_search_runs_as_a_job(place: Path, head: Head) -> None:
    tasks = [{"task": "t", "kind": "perplexity", "data": str(place / "unused.jsonl")}]
    space = {"settings.coefficient": {"low": 0.2, "high": 0.4, "step": 0.2}}
    search = {"searcher": "grid", "space": space, "objective": "perplexity", "evaluate": tasks}
    change(place / "recipe.yml", method="task_arithmetic", evaluate=[], search=search)
    assert '"num_trials": 2' in script(head, "search", place / "recipe.yml", place / "found")
    assert (place / "found" / "best.yml").exists() and (place / "found" / "merged" / "config.json").exists()
