"""Everything a report shows of an output folder: a merge, a distillation or a search, whichever parts there are."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from raymerge.errors import RayMergeError
from raymerge.models.blocks import block_name, natural_order
from raymerge.plan.build import build_plan
from raymerge.recipe.load import load_recipe
from raymerge.report import plots
from raymerge.report.agreement import OUTSIDE, measure_agreement
from raymerge.report.facts import EVALUATION
from raymerge.report.importance import importance
from raymerge.report.plots import Picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table with its caption; all entries are text."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page: plain text, tables, pictures, and text that is shown as it is."""

    name: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    verbatim: str = ""


def collect(out: Path) -> list[Section]:
    """The sections of a report of a merged folder, or of a search's. Raises RayMergeError if it is neither."""
    search = _json(out / "raymerge" / "search.json")
    merged = out / "merged" if search is not None else out
    run = _json(merged / "raymerge" / "run.json")
    if run is None:
        raise RayMergeError(f"{out}: no raymerge/run.json; the output of raymerge merge or search is expected")
    sections = [_overview(run), *_scores(merged)]
    if search is not None:
        sections += _search(out, search)
    sections += [*_losses(run), *_coefficients(merged), *_task_vectors(merged), _costs(run), _recipe(merged)]
    return sections


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _overview(run: Mapping[str, Any]) -> Section:
    rows = [
        ("method", run["method"]),
        ("finished", run["finished_at"]),
        ("took", f"{run['elapsed_seconds']:.1f} s, on {run['runner']}"),
        ("peak memory", f"{run['peak_bytes'] / 1e9:.2f} GB per process"),
        ("RayMerge", run["raymerge"]),
        *((name, version) for name, version in run["packages"].items()),
    ]
    inputs = [(one["name"], one["place"]) for one in run["inputs"]]
    return Section(
        name="overview",
        title="Overview",
        text=[f"Note: {note}" for note in run["notes"]],
        tables=[
            Table(caption="This run", headers=("", ""), rows=rows),
            Table(caption="Checkpoints", headers=("name", "place"), rows=inputs),
        ],
    )


def _scores(merged: Path) -> Iterator[Section]:
    found = _json(merged / EVALUATION)
    if found is None:
        return
    tasks = found["tasks"]
    rows = []
    for name, one in tasks.items():
        kept = "" if one["share_kept"] is None else f"{one['share_kept']:.1%}"
        rows.append((name, one["metric"], *(_number(one[key]) for key in ("base", "score", "expert")), kept))
    rows.append(("mean", "", "", _number(found["mean"]), "", ""))
    table = Table(
        caption="Scores on the test data", headers=("task", "metric", "base", "merged", "expert", "kept"), rows=rows
    )
    series = {
        title: [one[key] for one in tasks.values()]
        for title, key in (("base", "base"), ("merged", "score"), ("expert, on its own task", "expert"))
        if any(one[key] is not None for one in tasks.values())
    }
    picture = plots.bars("scores", "Scores of base, merged model and experts by task", list(tasks), series, "score")
    yield Section(name="scores", title="Scores", tables=[table], pictures=[picture])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _losses(run: Mapping[str, Any]) -> Iterator[Section]:
    units = [unit for unit in run.get("units", ()) if unit["losses"]]
    if not units:
        return
    lines = {unit["unit"]: [loss / unit["losses"][0] for loss in unit["losses"]] for unit in units if unit["losses"][0]}
    rows = [
        (
            unit["unit"],
            str(len(unit["losses"])),
            f"{unit['losses'][0]:.4g}",
            f"{unit['losses'][-1]:.4g}",
            f"{unit['losses'][-1] / unit['losses'][0]:.3f}" if unit["losses"][0] else "",
            f"{unit['elapsed_seconds']:.1f}",
        )
        for unit in units
    ]
    yield Section(
        name="losses",
        title="Distillation",
        tables=[
            Table(
                caption="Fits",
                headers=("unit", "epochs", "first loss", "last loss", "of its start", "seconds"),
                rows=rows,
            )
        ],
        pictures=[plots.curves("losses", "Loss of each unit, relative to its start", lines, "epoch", "relative loss")],
    )


def _coefficients(merged: Path) -> Iterator[Section]:
    path = merged / "raymerge" / "coefficients.safetensors"
    if not path.is_file():
        return
    edges = torch.linspace(-1.0, 2.0, 61)
    sums: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, torch.Tensor] = {}
    with safe_open(str(path), framework="pt") as tensors:
        named = sorted(load_recipe(merged / "raymerge" / "recipe.yml").experts, key=len, reverse=True)
        for key in sorted(tensors.keys(), key=natural_order):
            # Names of experts may have dots in them.
            expert = next(one for one in named if key.startswith(f"{one}."))
            name = key.removeprefix(f"{expert}.")
            value = tensors.get_tensor(key).flatten().float()
            block = block_name(name)
            place = OUTSIDE if block is None else f"{block.prefix}.{block.index}"
            entry = sums.setdefault(place, {}).setdefault(expert, [0.0, 0.0])
            entry[0] += float(value.sum())
            entry[1] += len(value)
            found = torch.histc(value.clamp(edges[0], edges[-1]), bins=60, min=float(edges[0]), max=float(edges[-1]))
            counts[expert] = counts.get(expert, torch.zeros(60)) + found
    experts = list(counts)
    values = [[entry[expert][0] / entry[expert][1] for expert in experts] for entry in sums.values()]
    shares = {expert: (found / found.sum()).tolist() for expert, found in counts.items()}
    yield Section(
        name="coefficients",
        title="Coefficients",
        pictures=[
            plots.heat_map("coefficients", "Mean coefficient by block and expert", list(sums), experts, values),
            plots.histogram("coefficients-histogram", "All learned coefficients by expert", edges.tolist(), shares),
        ],
    )


def _task_vectors(merged: Path) -> Iterator[Section]:
    recipe = load_recipe(merged / "raymerge" / "recipe.yml")
    try:
        plan = build_plan(recipe)
        found = measure_agreement(plan)
    except RayMergeError as problem:
        yield Section(name="task-vectors", title="Task vectors", text=[f"Not measured: {problem}"])
        return
    experts = [model.name for model in plan.models if model.name != "base"]
    if not found or len(experts) < 2:
        return
    upper = torch.triu_indices(len(experts), len(experts), offset=1)
    signs = [float(one.signs()[upper[0], upper[1]].mean()) for one in found.values()]
    cosines = [float(one.cosines()[upper[0], upper[1]].mean()) for one in found.values()]
    products = torch.stack([one.products for one in found.values()]).sum(0)
    norms = products.diagonal().sqrt().clamp_min(1e-30)
    whole = (products / norms / norms[:, None]).tolist()
    yield Section(
        name="task-vectors",
        title="Task vectors",
        text=["How far the experts moved the same way: 0.5 of equal signs and a cosine of 0 are no more than chance."],
        pictures=[
            plots.profiles(
                "agreement",
                "Agreement of task vectors by block, mean over pairs of experts",
                list(found),
                {"share of equal signs": signs, "cosine": cosines},
            ),
            plots.heat_map("cosines", "Cosine of every pair of task vectors", experts, experts, whole, -1.0, 1.0),
        ],
    )


def _search(out: Path, facts: Mapping[str, Any]) -> Iterator[Section]:
    table = pq.read_table(out / "trials.parquet")
    trials = table.to_pylist()
    objectives = list(facts["objectives"])
    lower = [name in ("perplexity", "entropy") for name in objectives]
    axes = [name for name in table.schema.names[1 : table.schema.names.index(objectives[0])]]
    whole = [trial for trial in trials if trial["error"] is None and trial["share_of_rows"] == 1.0]
    pictures = [
        plots.history(
            f"history-{name}",
            f"{name} of each trial on validation data",
            [trial[name] if trial in whole else None for trial in trials],
            low,
            name,
        )
        for name, low in zip(objectives, lower, strict=True)
    ]
    if len(objectives) > 1:
        pictures.append(
            plots.front(
                "pareto",
                f"{objectives[0]} against {objectives[1]}, with the Pareto front",
                [(trial[objectives[0]], trial[objectives[1]]) for trial in whole],
                [trial["pareto"] for trial in whole],
                (objectives[0], objectives[1]),
            )
        )
    weights = importance(whole, axes, objectives[0], lower[0])
    if weights:
        pictures.append(
            plots.bars(
                "importance",
                f"Importance of each setting for {objectives[0]}",
                list(weights),
                {"importance": list(weights.values())},
                "share of the variance",
            )
        )
    best = [(name, _shown(value)) for name, value in facts["best"]["values"].items()]
    best += [(f"{name}, on validation data", _shown(value)) for name, value in facts["best"]["scores"].items()]
    tables = [Table(caption=f"The best trial, number {facts['best']['trial']}", headers=("", ""), rows=best)]
    failed = [(str(trial["trial"]), trial["error"]) for trial in trials if trial["error"] is not None]
    if failed:
        tables.append(Table(caption="Trials that failed", headers=("trial", "error"), rows=failed))
    shown = [*axes, *objectives]
    tables.append(
        Table(
            caption="All trials",
            headers=("trial", *shown, "rows seen"),
            rows=[
                (str(trial["trial"]), *(_shown(trial[name]) for name in shown), f"{trial['share_of_rows']:.0%}")
                for trial in trials
            ],
        )
    )
    text = f"{facts['num_trials']} trials by {facts['searcher']} in {facts['elapsed_seconds']:.0f} s."
    yield Section(name="search", title="Search", text=[text], tables=tables, pictures=pictures)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _costs(run: Mapping[str, Any]) -> Section:
    rows = [
        ("whole run", f"{run['elapsed_seconds']:.1f} s"),
        ("merging, added up over files", f"{sum(shard['elapsed_seconds'] for shard in run['shards']):.1f} s"),
        ("fitting, added up over units", f"{sum(unit['elapsed_seconds'] for unit in run.get('units', ())):.1f} s"),
        ("read while merging", f"{sum(shard['bytes_read'] for shard in run['shards']) / 1e9:.3f} GB"),
        ("written while merging", f"{sum(shard['bytes_written'] for shard in run['shards']) / 1e9:.3f} GB"),
        ("peak memory of a process", f"{run['peak_bytes'] / 1e9:.2f} GB"),
        ("predicted by the plan", f"{run['predicted_peak_bytes_per_worker'] / 1e9:.2f} GB"),
    ]
    table = Table(caption="Time and memory", headers=("", ""), rows=rows)
    return Section(name="costs", title="Time and memory", tables=[table])


def _recipe(merged: Path) -> Section:
    text = (merged / "raymerge" / "recipe.yml").read_text(encoding="utf-8")
    return Section(name="recipe", title="Recipe", verbatim=text)
