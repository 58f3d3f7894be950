"""What Tune asks and tells: the same again after any interruption, by the journal alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from samples import make_family

from raymerge.errors import OutputError, StorageError
from raymerge.recipe.load import load_recipe
from raymerge.recipe.schema import Recipe
from raymerge.recipe.space import axes
from raymerge.run.journal import Journal
from raymerge.run.suggest import FAULT, MAX_LOSSES, PROBLEM, Suggester

SPACE = {"settings.coefficient": {"low": 0.0, "high": 1.0, "per": "expert", "step": 0.125}}
FINISHED = Searcher.FINISHED


def make_recipe(folder: Path, **search: Any) -> Recipe:
    asked = {"space": SPACE, "trials": 12, **search}
    return load_recipe({**make_family(folder), "method": "task_arithmetic", "settings": {}, "search": asked})


def suggester(recipe: Recipe, out: Path) -> Suggester:
    return Suggester(recipe, axes(recipe), Journal(out), lambda *_: None)


def result(values: Mapping[str, Any]) -> dict[str, Any]:
    """A score with its best at 0.3 for a, 0.7 for b; a trial beyond 0.7 fails."""
    a, b = values["settings.coefficient[a]"], values["settings.coefficient[b]"]
    if a > 0.7:
        return {PROBLEM: "too much", "mean_score": float("nan"), "entropy": float("nan")}
    return {"mean_score": 1 - (a - 0.3) ** 2 - (b - 0.7) ** 2, "entropy": a + b, "share": 1.0}


def go_on(one: Suggester, count: int = 1000) -> None:
    """At most so many trials, two at a time, of which the later one ends first."""
    for number in range(0, count, 2):
        pair = {f"{number + k}": values for k in (0, 1) if (values := one.suggest(f"{number + k}")) != FINISHED}
        for trial_id in sorted(pair, reverse=True):
            one.on_trial_complete(trial_id, result(pair[trial_id]))  # type: ignore[arg-type]
        if not pair:
            return


@pytest.mark.parametrize(
    "search",
    [
        {"searcher": "random"},
        {"searcher": "tpe"},
        {"searcher": "cmaes"},
        {"searcher": "grid"},
        {"searcher": "nsga2", "objective": ["mean_score", "entropy"], "trials": 120},
    ],
    ids=lambda search: search["searcher"],
)
def test_interrupted_it_suggests_what_it_would_have(search: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, **search)
    whole = suggester(recipe, tmp_path / "whole")
    go_on(whole)
    first = suggester(recipe, tmp_path / "out")
    go_on(first, 6)
    # Two that were begun are lost with the driver, which no longer tells anybody.
    for name in ("lost", "too"):
        first.suggest(name)
    second = suggester(recipe, tmp_path / "out")
    assert second.trials == first.trials and len(second.trials) == 6
    go_on(second)
    expected = [(trial.number, dict(trial.values), dict(trial.scores), trial.error) for trial in whole.trials]
    assert [(t.number, dict(t.values), dict(t.scores), t.error) for t in second.trials] == expected
    assert second.num_open == 0 and any(trial.error for trial in second.trials)
    assert suggester(recipe, tmp_path / "out").suggest("more") == FINISHED


def test_a_lost_trial_is_begun_again(tmp_path: Path) -> None:
    """With the numbers it had, and not for ever."""
    one = suggester(make_recipe(tmp_path, trials=2), tmp_path / "out")
    values = one.suggest("0")
    one.on_trial_complete("0", error=True)
    for time in range(MAX_LOSSES):
        assert one.num_open == 2 and one.suggest(f"again-{time}") == values
        one.on_trial_complete(f"again-{time}", error=True)
    (trial,) = one.trials
    assert trial.error == "its process was lost 4 times" and one.num_ended == 4
    assert one.suggest("1") != values


def test_a_fault_of_nodes_ends_no_trial(tmp_path: Path) -> None:
    """Another node may do better; where none does, the search ends, and goes on with the same trial."""
    recipe = make_recipe(tmp_path, trials=2)
    one = suggester(recipe, tmp_path / "out")
    values = one.suggest("first")
    for time in range(MAX_LOSSES):
        one.on_trial_complete("first" if time == 0 else f"again-{time - 1}", {FAULT: "node-7: the disk is full"})
        assert one.fault is None and one.suggest(f"again-{time}") == values
    one.on_trial_complete(f"again-{MAX_LOSSES - 1}", {FAULT: "node-7: the disk is full"})
    assert one.fault == "node-7: the disk is full" and one.suggest("more") == FINISHED
    assert not one.trials
    again = suggester(recipe, tmp_path / "out")
    assert again.suggest("next") == values
    # What ends after that is kept.
    again.fault = "node-7: the disk is full"
    again.on_trial_complete("next", result(values))  # type: ignore[arg-type]
    assert len(suggester(recipe, tmp_path / "out").trials) == 1


def test_a_journal_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was being written then is lost, and nothing after it is written: a journal has no holes."""
    recipe = make_recipe(tmp_path)
    one = suggester(recipe, tmp_path / "out")
    go_on(one, 4)
    written = Journal.append

    def full(*_: object) -> None:
        raise StorageError("out/journal: no space is left")

    values = [one.suggest(name) for name in ("x", "y")]
    monkeypatch.setattr(Journal, "append", full)
    one.on_trial_complete("x", result(values[0]))  # type: ignore[arg-type]
    monkeypatch.setattr(Journal, "append", written)
    one.on_trial_complete("y", result(values[1]))  # type: ignore[arg-type]
    assert one.fault == "out/journal: no space is left" and one.suggest("z") == FINISHED
    again = suggester(recipe, tmp_path / "out")
    assert len(again.trials) == 4 and [again.suggest(name) for name in ("x", "y")] == values


def test_a_journal_of_another_sampler(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    go_on(suggester(recipe, tmp_path / "out"), 2)
    first = tmp_path / "out" / "journal" / "000000.json"
    event = json.loads(first.read_text())
    event["values"]["settings.coefficient[a]"] += 0.125
    first.write_text(json.dumps(event))
    with pytest.raises(OutputError, match=r"trial 0 was .* is suggested, as by another version of Optuna"):
        suggester(recipe, tmp_path / "out")
