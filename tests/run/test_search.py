"""A search end to end on small classifiers: its trials are merges, its best is a recipe, killed it goes on."""

from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from samples import make_family
from tiny import load, make_bert, make_llama, weights
from tiny import recipe as plain

from raymerge import api
from raymerge.errors import RecipeError
from raymerge.plan.build import build_plan
from raymerge.recipe.load import load_recipe
from raymerge.recipe.space import axes, first_recipes, trial_recipe
from raymerge.report.search import search_digest
from raymerge.run.trial import Bench


def family(folder: Path, **search: Any) -> dict[str, Any]:
    """Two classifiers, and rows with the classes they themselves give, for validation and for test."""
    asked = make_family(folder)
    tasks: dict[str, list[dict[str, Any]]] = {"valid": [], "test": []}
    for expert in ("a", "b"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / expert).eval()
        for number, part in enumerate(tasks):
            texts = [" ".join(f"w{(5 * i + 3 * j + number) % 28}" for j in range(1 + i % 7)) for i in range(40)]
            with torch.no_grad():
                labels = [
                    int(model(torch.tensor([[int(word[1:]) + 3 for word in text.split()]])).logits.argmax())
                    for text in texts
                ]
            data = str(folder / f"{expert}-{part}.parquet")
            pq.write_table(pa.table({"text": texts, "label": labels}), data)
            tasks[part].append({"task": expert, "expert": expert, "kind": "classification", "data": data})
    return {
        **asked,
        "method": "task_arithmetic",
        "settings": {},
        "evaluate": tasks["test"],
        "search": {"trials": 4, "evaluate": tasks["valid"], "concurrent": 1, **search},
    }


def num_told(out: Path) -> int:
    """How many trials have ended, by the journal of a search that goes on."""
    return sum("scores" in path.read_text() for path in (out / "journal").glob("*.json"))


PER_EXPERT = {"settings.coefficient": {"low": 0.0, "high": 1.0, "per": "expert"}}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "model_stock"])
def test_a_trial_is_the_merge_it_stands_for(method: str, tmp_path: Path) -> None:
    """Parameter by parameter, for one trial after another on the same bench."""
    asked = {**family(tmp_path), "method": method, "output": {"dtype": "bfloat16"}}
    bench = Bench()
    for seed in (0, 1):
        recipe = load_recipe({**asked, "seed": seed})
        models, _ = bench.merge(recipe, ["a", "b"])
        api.merge(recipe, tmp_path / f"out{seed}", local=True)
        for expert, model in models.items():
            expected = __import__("raymerge").load_task_model(tmp_path / f"out{seed}", expert).state_dict()
            found = model.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name].to(found[name].dtype)) for name in found)
    assert models["a"].base_model is models["b"].base_model


def test_axes_and_the_recipes_they_make(tmp_path: Path) -> None:
    space = {
        "method": {"choices": ["task_arithmetic", "ties"]},
        "settings.coefficient": {"low": 0.0, "high": 1.0, "knots": 2, "per": "expert"},
        "ties.settings.density": {"low": 0.1, "high": 1.0, "filters": ["attention"]},
    }
    recipe = load_recipe({**family(tmp_path), "search": {"space": space}})
    found = axes(recipe)
    names = [axis.name for axis in found]
    assert names == [
        "method",
        "settings.coefficient[a]@0",
        "settings.coefficient[a]@1",
        "settings.coefficient[b]@0",
        "settings.coefficient[b]@1",
        "ties.settings.density{attention}",
        "ties.settings.density{*}",
    ]
    values = dict(zip(names, ["task_arithmetic", 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], strict=True))
    made = trial_recipe(recipe, found, values)
    assert made.search is None and made.method == "task_arithmetic" and made.settings == {}
    assert made.experts["a"].settings == {"coefficient": [0.1, 0.2]}
    assert made.experts["b"].settings == {"coefficient": [0.3, 0.4]}
    made = trial_recipe(recipe, found, {"method": "ties", names[5]: 0.5, names[6]: 0.6})
    assert made.as_written()["settings"] == {
        "density": [{"filter": "attention", "value": 0.5}, {"filter": "*", "value": 0.6}]
    }


def test_blocks_in_another_order(tmp_path: Path) -> None:
    """Skips, repeats, an exchange and its scale: slices that merge as they say."""
    for seed, name in ((0, "base"), (1, "a"), (2, "b")):
        make_llama(tmp_path / name, seed, blocks=2)
    asked = plain(tmp_path / "base", tmp_path / "a", tmp_path / "b", method="passthrough")
    asked["search"] = {"layers": {"repeats": 2, "scale": {"low": 0.5, "high": 1.5}}}
    recipe = load_recipe(asked)
    found = axes(recipe)
    names = list(recipe.experts)
    first = [f"layers.0.{names[0]}.0", f"layers.0.{names[0]}.1", f"layers.0.{names[1]}.0"]
    assert [axis.name for axis in found[:3]] == first
    assert len(found) == 2 * 2 * 2 + 2
    values = dict.fromkeys((axis.name for axis in found), -1.0)
    one, two = names
    for name in (f"layers.0.{one}.0", f"layers.0.{one}.1", f"layers.0.{two}.1", f"layers.1.{one}.1"):
        values[name] = 0.5
    values |= {f"scale[{one}>{two}]": 0.8, f"scale[{two}>{one}]": 1.2}
    made = trial_recipe(recipe, found, values)
    assert [{n: s.blocks for n, s in part.sources.items()} for part in made.slices or ()] == [
        {one: (0, 2)},
        {two: (1, 2)},
        {one: (1, 2)},
    ]
    api.merge(made, tmp_path / "out", local=True)
    assert [len(one.slices or ()) for one in first_recipes(recipe, found)] == [4]
    merged = load(tmp_path / "out")
    experts = {name: load(Path(expert.path)) for name, expert in recipe.experts.items()}
    part = "mlp.down_proj.weight"
    assert torch.equal(merged[f"model.layers.1.{part}"], experts[one][f"model.layers.1.{part}"])
    assert torch.allclose(merged[f"model.layers.2.{part}"], 0.8 * experts[two][f"model.layers.1.{part}"])
    assert torch.allclose(merged[f"model.layers.3.{part}"], 1.2 * experts[one][f"model.layers.1.{part}"])
    part = "mlp.up_proj.weight"
    assert torch.equal(merged[f"model.layers.2.{part}"], experts[two][f"model.layers.1.{part}"])
    models, _ = Bench().merge(made, [None])
    state = models[None].state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in merged.items())
    with pytest.raises(RecipeError, match="search.layers: this trial keeps no block"):
        trial_recipe(recipe, found, dict.fromkeys(values, -1.0))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"settings.coeficient": {"low": 0, "high": 1}}, "has no such setting; did you mean 'coefficient'"),
        ({"settings.coefficient": {"low": 1, "high": 0}}, "low is 1 and high 0; low below high is expected"),
        ({"settings.coefficient": {"low": 0}}, "low and high, or choices, are expected"),
        ({"settings.coefficient": {"low": 0, "high": 1, "log": True}}, "log: needs a low above 0"),
        ({"method": {"choices": ["tees"]}}, "'tees', which is no method; did you mean 'ties'"),
        ({"coefficient": {"low": 0, "high": 1}}, "settings.NAME, METHOD.settings.NAME or method is expected"),
    ],
)
def test_spaces_that_cannot_be(space: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        axes(
            load_recipe(
                {**make_family(tmp_path), "method": "task_arithmetic", "settings": {}, "search": {"space": space}}
            )
        )


def test_the_test_rows_are_not_searched(tmp_path: Path) -> None:
    asked = family(tmp_path)
    copied = tmp_path / "other-name.parquet"
    copied.write_bytes(Path(asked["evaluate"][0]["data"]).read_bytes())
    asked["search"]["evaluate"][0] = {**asked["search"]["evaluate"][0], "data": str(copied)}
    with pytest.raises(RecipeError, match="search.evaluate: a reads the rows of evaluate: a, .* give it other rows"):
        api.search(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_session")
def test_the_best_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With paths that are relative to the driver's folder."""
    monkeypatch.chdir(tmp_path)
    asked = family(Path(), space=PER_EXPERT, trials=6, objective=["mean_score", "entropy"], searcher="nsga2")
    told: list[int] = []
    # What cannot be pickled, as a bar on a terminal cannot.
    lock = Lock()
    found = api.search(asked, "out", progress=lambda *at: None if lock.locked() else told.append(at[1]))
    assert 6 in told
    rows = pq.read_table(tmp_path / "out" / "trials.parquet").to_pylist()
    assert len(rows) == found.facts["num_trials"] == 6 and found.facts["num_failed"] == 0
    best = max(rows, key=lambda row: (row["mean_score"], -row["trial"]))
    assert found.facts["objectives"]["mean_score"] == best["mean_score"]
    front = [row for row in rows if row["pareto"]]
    assert best in front or any(row["mean_score"] == best["mean_score"] for row in front)
    for row in rows:
        beaten = [
            other
            for other in rows
            if other["mean_score"] >= row["mean_score"]
            and other["entropy"] <= row["entropy"]
            and (other["mean_score"], other["entropy"]) != (row["mean_score"], row["entropy"])
        ]
        assert row["pareto"] == (not beaten)
    # The recipe gives the checkpoint, and the checkpoint the scores.
    recipe = yaml.safe_load((tmp_path / "out" / "best.yml").read_text())
    api.merge(recipe, tmp_path / "again", local=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "out" / "merged")
    scores = api.evaluate(tmp_path / "again", {**recipe, "evaluate": asked["search"]["evaluate"]})
    assert {f"score.{task}": score.score for task, score in scores.tasks.items()} == {
        name: value for name, value in best.items() if name.startswith("score.")
    }
    assert set(found.facts["test"]["tasks"]) == {"a", "b"}
    assert api.search(asked, tmp_path / "out").facts == found.facts
    assert "Scores on the test data" in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "journal").exists()


def test_all_methods_of_a_search_identify_it(tmp_path: Path) -> None:
    space = {"method": {"choices": ["task_arithmetic", "ties"]}}
    asked = family(tmp_path, space=space, trials=2) | {"method": "ties"}
    digests = set()
    for density in (0.2, 0.5):
        loaded = load_recipe({**asked, "settings": {"density": density}})
        plans = [build_plan(one) for one in first_recipes(loaded, axes(loaded))]
        digests.add(search_digest(plans, loaded, ()))
    assert len(digests) == 2


def test_a_method_that_fits_nowhere_is_refused_at_once(tmp_path: Path) -> None:
    asked = family(tmp_path, space={"method": {"choices": ["task_arithmetic", "slerp"]}})
    with pytest.raises(RecipeError, match="slerp"):
        api.search(asked, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"searcher": "grid", "space": PER_EXPERT}, "step: a grid needs it"),
        ({"searcher": "cmaes", "objective": ["mean_score", "entropy"]}, "cmaes has one objective"),
        ({"stop_early": True, "searcher": "nsga2", "objective": ["mean_score", "entropy"]}, "stop_early"),
    ],
)
def test_searchers_that_cannot_be(search: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        api.search(family(tmp_path, **search), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_axis_under_an_experts_own_setting_is_refused(tmp_path: Path) -> None:
    asked = family(tmp_path, space=PER_EXPERT)
    asked["experts"]["a"]["settings"] = {"coefficient": 0.4}
    with pytest.raises(RecipeError, match="experts.a.settings.coefficient stands above it"):
        axes(load_recipe(asked))


def test_heads_that_the_base_has_too(tmp_path: Path) -> None:
    """The experts' own heads are measured, whatever head the base has."""
    asked = family(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        make_bert(tmp_path / "same" / name, seed, with_head=2)
    asked |= {"base": str(tmp_path / "same" / "base"), "output": {"heads": ["classifier"]}}
    asked["experts"] = {name: str(tmp_path / "same" / name) for name in ("a", "b")}
    bench = Bench()
    for seed in (0, 1):
        models, _ = bench.merge(load_recipe({**asked, "seed": seed}), ["a", "b"])
    for expert, model in models.items():
        own = load(tmp_path / "same" / str(expert))
        assert torch.equal(model.state_dict()["classifier.weight"], own["classifier.weight"])


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_methods_searched_and_one_that_fails(tmp_path: Path) -> None:
    """Conditional settings; what overflows is the end of a trial, and not of the search."""
    space = {
        "method": {"choices": ["ties", "task_arithmetic"]},
        "task_arithmetic.settings.coefficient": {"choices": [0.5]},
        "ties.settings.scale": {"choices": [1e9]},
    }
    asked = family(tmp_path, space=space, trials=5, searcher="random", objective="worst_share_kept")
    asked["output"] = {"dtype": "float16"}
    found = api.search(asked, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "trials.parquet").to_pylist()
    assert {row["method"] for row in rows} == {"ties", "task_arithmetic"}
    assert all((row["error"] is not None) == (row["method"] == "ties") for row in rows)
    assert any(row["error"] for row in rows)
    assert found.facts["best"]["values"]["method"] == "task_arithmetic"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("searcher", ["tpe", "cmaes", "random", "grid"])
def test_the_same_seed_gives_the_same_trials(searcher: str, tmp_path: Path) -> None:
    space = {"settings.coefficient": {"low": 0.0, "high": 1.0, **({"step": 0.25} if searcher == "grid" else {})}}
    asked = family(tmp_path, space=space, trials=5, searcher=searcher)
    tables = []
    for out in ("one", "two"):
        api.search(asked, tmp_path / out)
        rows = pq.read_table(tmp_path / out / "trials.parquet").to_pylist()
        tables.append([(row["settings.coefficient"], row["mean_score"]) for row in rows])
    assert tables[0] == tables[1] and len(set(tables[0])) == 5
    if searcher == "grid":
        assert sorted(value for value, _ in tables[0]) == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_distillations_as_trials_and_bad_ones_stopped(tmp_path: Path) -> None:
    asked = family(
        tmp_path, space={"settings.epochs": {"low": 1, "high": 3}}, trials=4, searcher="random", stop_early=True
    )
    asked |= {"method": "prodistill", "settings": {"batch_size": 6, "samples": 12, "max_length": 12}}
    found = api.search(asked, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "trials.parquet").to_pylist()
    assert all(isinstance(row["settings.epochs"], int) and 1 <= row["settings.epochs"] <= 3 for row in rows)
    assert any(row["share_of_rows"] == 1.0 for row in rows)
    # In as many threads as this machine has; a trial has one.
    best = api.evaluate(found.out / "merged", {**asked, "evaluate": asked["search"]["evaluate"]})
    assert best.mean == pytest.approx(found.facts["objectives"]["mean_score"], abs=0.05)
