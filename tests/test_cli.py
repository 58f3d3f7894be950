"""The command: what it prints where, exit codes, one readable line for a user's mistake."""

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from command import COMMAND, environment, python, raymerge
from tiny import load, make_bert, make_llama, recipe

from raymerge import cli, methods


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for seed, name in ((0, "base"), (1, "a"), (2, "b")):
        make_llama(folder / name, seed)
    content = recipe(folder / "base", folder / "a", folder / "b", output={"shard_size": 8000})
    (folder / "recipe.yml").write_text(json.dumps(content))
    (folder / "wrong.yml").write_text(json.dumps({**content, "method": "tie"}))
    return folder


def test_a_merge_in_one_line(place: Path) -> None:
    found = raymerge("merge", place / "recipe.yml", place / "out", "--local")
    assert found.returncode == 0 and not found.stderr
    assert found.stdout.startswith(f"{place}/out: linear of 3 checkpoints, ")
    assert found.stdout.count("\n") == 1


def test_quiet_says_nothing(place: Path) -> None:
    found = raymerge("merge", place / "recipe.yml", place / "quiet", "--local", "--quiet")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_through_ray_the_output_is_as_short(place: Path) -> None:
    found = raymerge("merge", place / "recipe.yml", place / "ray", "--workers", "1")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("\n") == 1 and found.stderr == ""


def test_a_bar_on_a_terminal(place: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "merge", str(place / "recipe.yml"), str(place / "bar"), "--local"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment(TERM="xterm")) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # how Linux tells the end of a terminal
            pass
    os.close(ours)
    assert process.returncode == 0
    assert "━".encode() in shown and b"linear of 3 checkpoints" in shown


def test_in_a_file_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Short work says nothing."""
    cli._lines()("merging", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cli, "LINE_SECONDS", 0)
    cli._lines()("merging", 1, 2)
    assert capsys.readouterr().err == "merging: 1 of 2\n"


def test_a_mistake_is_one_line_and_exit_code_2(place: Path) -> None:
    found = raymerge("merge", place / "wrong.yml", place / "none", "--local")
    assert found.returncode == 2 and found.stdout == ""
    assert "did you mean 'ties'?" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (place / "none").exists() and not (place / "none.partial").exists()


def test_debug_shows_where(place: Path) -> None:
    for arguments in (("--debug", "plan", place / "wrong.yml"), ("plan", place / "wrong.yml", "--debug")):
        found = raymerge(*arguments)
        assert found.returncode != 0
        assert "Traceback" in found.stderr and "did you mean 'ties'?" in found.stderr


@pytest.mark.parametrize("arguments", [("merge",), ("merg",), ("plan", "a", "--no-such"), ("methods", "tie")])
def test_wrong_arguments(arguments: tuple[str, ...]) -> None:
    found = raymerge(*arguments)
    assert found.returncode == 2
    assert found.stderr and "Traceback" not in found.stderr


def test_a_plan_for_people_and_for_programs(place: Path) -> None:
    shown = raymerge("plan", place / "recipe.yml")
    assert shown.returncode == 0 and "peak memory per worker" in shown.stdout
    found = json.loads(raymerge("plan", place / "recipe.yml", "--json").stdout)
    size = sum(value.nbytes for value in load(place / "base").values())
    assert found["bytes_read"] >= 2 * size
    assert found["bytes_written"] >= size
    assert sum(shard["num_tensors"] for shard in found["shards"]) == found["num_tensors"] == 21
    bounded = json.loads(raymerge("plan", place / "recipe.yml", "--json", "--memory", "2GB").stdout)
    assert bounded["peak_bytes_per_worker"] <= 2_000_000_000


def test_the_catalogue() -> None:
    shown = raymerge("methods")
    assert all(name in shown.stdout for name in methods.CATALOGUE)
    one = raymerge("methods", "ties")
    assert "2306.01708" in one.stdout and "density" in one.stdout


def test_evaluation_as_json(place: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{i + 1} w3 w4"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    content = json.loads((place / "recipe.yml").read_text())
    content["evaluate"] = [{"task": "t", "expert": "a", "kind": "perplexity", "data": str(tmp_path / "rows.jsonl")}]
    (tmp_path / "recipe.yml").write_text(json.dumps(content))
    found = raymerge("evaluate", place / "a", tmp_path / "recipe.yml", "--experts", "--json")
    assert found.returncode == 0, found.stderr
    task = json.loads(found.stdout)["tasks"]
    assert "perplexity" in json.dumps(task)
    shown = raymerge("evaluate", place / "a", tmp_path / "recipe.yml", "--experts")
    assert shown.returncode == 0 and "100" in shown.stdout


LOADED = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "raymerge" not in sys.modules
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("w4 w5", return_tensors="pt")["input_ids"]
print(json.dumps([tuple(model(ids).logits.shape), tokenizer.convert_ids_to_tokens(ids[0])]))
"""


def test_the_output_loads_without_raymerge(place: Path, tmp_path: Path) -> None:
    assert raymerge("merge", place / "recipe.yml", tmp_path / "out", "--local").returncode == 0
    found = python(LOADED, tmp_path / "out", cwd=tmp_path, PYTHONPATH="")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [[1, 2, 32], ["w4", "w5"]]
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "tokenizer.json", "raymerge/recipe.yml", "raymerge/run.json"} <= names


def test_a_folder_of_heads_loads_a_task_model(tmp_path: Path) -> None:
    make_bert(tmp_path / "base")
    for seed, (name, labels) in enumerate((("a", 2), ("b", 3)), 1):
        make_bert(tmp_path / name, seed, with_head=labels)
    content = recipe(tmp_path / "base", tmp_path / "a", tmp_path / "b", method="task_arithmetic")
    (tmp_path / "recipe.yml").write_text(json.dumps(content))
    assert raymerge("merge", tmp_path / "recipe.yml", tmp_path / "out", "--local").returncode == 0
    import raymerge as package

    assert package.load_task_model(tmp_path / "out", "b").config.num_labels == 3
