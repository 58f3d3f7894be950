"""Everything a report shows of an output folder: a merge, a distillation or a search, whichever parts there are."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raymerge.checkpoint.model_folder import RECIPE
from raymerge.errors import RayMergeError
from raymerge.report import plots
from raymerge.report.facts import EVALUATION
from raymerge.report.of_trials import trials_section
from raymerge.report.of_weights import coefficients_sections, task_vectors_sections
from raymerge.report.section import Section, Table


def collect(out: Path) -> list[Section]:
    """The sections of a report of a merged folder, or of a search's. Raises RayMergeError if it is neither."""
    search = _json(out / "raymerge" / "search.json")
    merged = out / "merged" if search is not None else out
    run = _json(merged / "raymerge" / "run.json")
    if run is None:
        raise RayMergeError(f"{out}: no raymerge/run.json; the output of raymerge merge or search is expected")
    sections = [_overview(run), *_scores(merged)]
    if search is not None:
        sections.append(trials_section(out, search))
    sections += [
        *_losses(run),
        *coefficients_sections(merged),
        *task_vectors_sections(merged),
        _costs(run),
        _recipe(merged),
    ]
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
    text = (merged / RECIPE).read_text(encoding="utf-8")
    return Section(name="recipe", title="Recipe", verbatim=text)
