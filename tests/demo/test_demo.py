"""The demo: domains that conflict, training that repeats, and (slow) the whole of it."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from raymerge.demo.demo import run_demo
from raymerge.demo.domains import CLEAN, DOMAINS, EXPERTS, NUM_TEST, TEST_DRAW, load_split, shifted, write_parquet
from raymerge.demo.recipes import METHODS, write_recipe
from raymerge.demo.results import DemoResult, Row
from raymerge.demo.train import train_all
from raymerge.errors import OutputError
from raymerge.evaluate.measure import measure
from raymerge.evaluate.rows import check_task, open_rows
from raymerge.methods import CATALOGUE
from raymerge.recipe.load import load_recipe
from raymerge.recipe.schema import Task


def test_split_is_fixed_and_whole() -> None:
    train, test = load_split()
    assert (len(train.labels), len(test.labels)) == (1797 - NUM_TEST, NUM_TEST)
    assert torch.equal(load_split()[1].images, test.images)
    assert set(test.labels.tolist()) == set(range(10))
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    # No test image was trained on.
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


@pytest.mark.parametrize("domain", EXPERTS)
def test_domains_keep_labels_and_change_images(domain: str) -> None:
    _, test = load_split()
    found = shifted(test, domain, TEST_DRAW)
    assert torch.equal(found.labels, test.labels)
    assert found.images.shape == test.images.shape and found.images.dtype == torch.uint8
    assert (found.images != test.images).flatten(1).any(1).all()
    assert torch.equal(shifted(test, domain, TEST_DRAW).images, found.images)


def test_domains_are_what_they_say() -> None:
    _, test = load_split()
    clean = test.images
    assert torch.equal(shifted(test, CLEAN, 0).images, clean)
    assert torch.equal(255 - shifted(test, "inverted", 0).images, clean)
    rotated = shifted(test, "rotated", 0)
    for _ in range(3):
        rotated = shifted(rotated, "rotated", 0)
    assert torch.equal(rotated.images, clean)
    permuted = shifted(test, "permuted", 0).images
    assert torch.equal(permuted.flatten(1).sort().values, clean.flatten(1).sort().values)
    noisy = shifted(test, "noisy", 0).images
    assert (noisy >= clean).all()
    assert not torch.equal(noisy, shifted(test, "noisy", 1).images)


def test_data_is_read_by_the_ordinary_path(tmp_path: Path) -> None:
    _, test = load_split()
    write_parquet(test, tmp_path / "clean.parquet")
    task = Task(task="clean", kind="classification", data=str(tmp_path / "clean.parquet"))
    check_task(task)
    assert open_rows(task).columns(["label"])["label"] == test.labels.tolist()


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_training_repeats_on_any_number_of_workers(tmp_path: Path) -> None:
    told: list[str] = []
    train_all(tmp_path / "a", workers=1, base_epochs=1, expert_epochs=1, tell=told.append)
    train_all(tmp_path / "b", workers=2, base_epochs=1, expert_epochs=1)
    assert told == ["base", *EXPERTS]
    assert [digest(tmp_path / "a" / name) for name in told] == [digest(tmp_path / "b" / name) for name in told]
    assert len({digest(tmp_path / "a" / name) for name in told}) == 5
    write_parquet(load_split()[1], tmp_path / "clean.parquet")
    task = Task(task="clean", kind="classification", data=str(tmp_path / "clean.parquet"), limit=200)
    assert measure(str(tmp_path / "a" / "base"), task).score > 0.3


@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_valid(tmp_path: Path, method: str) -> None:
    recipe = load_recipe(write_recipe(tmp_path, method))
    assert method in CATALOGUE and recipe.method == method
    assert [task.task for task in recipe.evaluate] == list(DOMAINS)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no earlier demo"):
        run_demo(tmp_path, quiet=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def row(name: str, kind: str, score: float) -> Row:
    return Row(
        name=name,
        kind=kind,
        path=Path("p") / name,
        scores=dict.fromkeys(DOMAINS, score),
        share_kept=score,
        elapsed_seconds=999.5 if kind == "merge" else None,
        peak_bytes=1_234_000_000 if kind == "merge" else None,
    )


def test_table_fits_a_terminal() -> None:
    rows = [row("base", "base", 0.25), row("inverted", "expert", 0.9), *(row(name, "merge", 0.5) for name in METHODS)]
    result = DemoResult(out=Path("p"), rows=rows, elapsed_seconds=1.0)
    text = io.StringIO()
    Console(file=text, width=80).print(result.to_table())
    for name in (*METHODS, *DOMAINS, "999.5", "1234"):
        assert name in text.getvalue()
    assert "…" not in text.getvalue()
    assert result.best.name == next(iter(METHODS))
    assert json.loads(result.to_json())["best"] == str(result.best.path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_demo(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "out", workers=2, quiet=True)
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["base", *EXPERTS, *METHODS, "search"]
    assert rows["base"].scores[CLEAN] > 0.9
    for name in EXPERTS:
        assert rows[name].scores[name] > 0.9
        assert rows["base"].scores[name] < rows[name].scores[name] - 0.05
    alone = max(rows[name].mean for name in ("base", *EXPERTS))
    assert result.best.mean > alone + 0.05
    assert result.best.name == "prodistill" and result.best.share_kept > 0.93
    assert (result.best.path / "config.json").is_file()
    assert rows["search"].mean >= rows["task_arithmetic"].mean - 0.02
