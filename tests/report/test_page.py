"""Reports of real outputs, opened in headless Chromium: every part is there, nothing comes from elsewhere."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import make_family
from tiny import load, make_llama, recipe

from raymerge import api
from raymerge.errors import RayMergeError
from raymerge.plan.build import build_plan
from raymerge.recipe.load import load_recipe
from raymerge.recipe.schema import Search
from raymerge.report.agreement import measure_agreement
from raymerge.report.importance import importance
from raymerge.report.page import render
from raymerge.report.trials import best_of, pareto_front

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,1400",
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield found
    finally:
        found.quit()


def named(browser: Any, role: str) -> list[str]:
    """The accessible names of all elements of a role."""
    elements = browser.find_elements("css selector", "h1, h2, table, img, nav, section, a, pre")
    return [element.accessible_name for element in elements if element.aria_role == role]


def test_a_distillation_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """With an expert whose name is markup."""
    asked = make_family(tmp_path, epochs=3) | {"output": {"coefficients": True}}
    asked["experts"]["<b>b&amp;"] = asked["experts"].pop("b")
    api.merge(asked, tmp_path / "out", local=True)
    page = api.report(tmp_path / "out")
    browser.get(page.as_uri())
    assert named(browser, "heading") == [
        "out",
        "Overview",
        "Distillation",
        "Coefficients",
        "Task vectors",
        "Time and memory",
        "Recipe",
    ]
    assert named(browser, "image") == [
        "Loss of each unit, relative to its start",
        "Mean coefficient by block and expert",
        "All learned coefficients by expert",
        "Agreement of task vectors by block, mean over pairs of experts",
        "Cosine of every pair of task vectors",
    ]
    assert named(browser, "navigation") == ["Sections"]
    assert "Fits" in named(browser, "table")
    cells = [cell.text for cell in browser.find_elements("css selector", "th[scope=row]")]
    assert "<b>b&amp;" in cells and "encoder.layer.1" in cells
    assert not browser.find_elements("css selector", "b, script")
    for image in browser.find_elements("css selector", "img"):
        assert browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", image)
    assert browser.get_log("browser") == []
    pictures = {path.name for path in (tmp_path / "out" / "raymerge" / "pictures").iterdir()}
    assert {"losses.png", "losses.svg", "coefficients.png", "agreement.svg"} <= pictures


def test_a_page_is_escaped_and_whole() -> None:
    found = render("<script>alert(1)</script>", [])
    assert "<script>" not in found and "&lt;script&gt;" in found
    assert "http://" not in found and "https://" not in found


def test_what_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(RayMergeError, match="no raymerge/run.json; the output of raymerge merge or search is expected"):
        api.report(tmp_path)


def test_agreement_against_whole_tensors(tmp_path: Path) -> None:
    for seed, name in ((0, "base"), (1, "a"), (2, "b")):
        make_llama(tmp_path / name, seed, blocks=2)
    asked = recipe(tmp_path / "base", tmp_path / "a", tmp_path / "b", method="task_arithmetic")
    found = measure_agreement(build_plan(load_recipe(asked)))
    base, *experts = (load(tmp_path / name) for name in ("base", "a", "b"))
    names = [name for name in base if ".layers.1." in name]
    one, two = (torch.cat([(e[n].double() - base[n].double()).flatten() for n in names]) for e in experts)
    block = found["model.layers.1"]
    assert float(block.cosines()[0, 1]) == pytest.approx(float(torch.cosine_similarity(one, two, 0)), abs=1e-5)
    assert float(block.signs()[0, 1]) == pytest.approx(float((one.sign() == two.sign()).double().mean()), abs=1e-6)
    assert float(block.cosines()[0, 0]) == pytest.approx(1.0)


class Row:
    """As much of a trial as the table's functions ask for."""

    is_whole = True

    def __init__(self, number: int, **scores: float) -> None:
        self.number = number
        self.scores = scores


def test_the_best_and_the_front() -> None:
    rows = [
        Row(0, mean_score=1.0, entropy=5.0),
        Row(1, mean_score=3.0, entropy=3.0),
        Row(2, mean_score=3.0, entropy=4.0),
        Row(3, mean_score=0.5, entropy=6.0),
        Row(4, mean_score=3.0, entropy=3.0),
    ]
    assert pareto_front(rows, Search(objective=["mean_score", "entropy"])) == {1, 4}
    assert best_of(rows, Search(objective=["mean_score"])).number == 1
    assert best_of(rows, Search(objective=["entropy"])).number == 1


def test_importance_finds_what_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    trials = []
    for _ in range(60):
        x, y = torch.rand(2, generator=generator).tolist()
        trials.append({"x": x, "y": y, "score": -((x - 0.5) ** 2)})
    found = importance(trials, ["x", "y"], "score", lower=False)
    assert found["x"] > 0.7 and sum(found.values()) == pytest.approx(1.0)
    assert importance(trials[:3], ["x", "y"], "score", lower=False) == {}


def test_scores_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = make_family(tmp_path, epochs=1)
    asked["evaluate"] = [
        {"task": "a", "expert": "a", "kind": "classification", "data": str(tmp_path / "a.parquet"), "limit": 2}
    ]
    api.merge(asked, tmp_path / "out", local=True)
    first = api.report(tmp_path / "out").read_text()
    stored = json.loads((tmp_path / "out" / "raymerge" / "evaluation.json").read_text())
    assert set(stored["tasks"]["a"]) == {"metric", "score", "share_kept", "expert", "base"}
    monkeypatch.setattr(api, "evaluate", None)
    assert "Scores on the test data" in api.report(tmp_path / "out").read_text()
    assert "Scores on the test data" in first
