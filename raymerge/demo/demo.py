"""Train a base and four experts on real handwritten digits, merge them with eleven methods, search, measure all."""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from raymerge import api
from raymerge.checkpoint.writer import write_text
from raymerge.demo.domains import (
    CALIBRATION_DRAW,
    DOMAINS,
    EXPERTS,
    NUM_CALIBRATION,
    TEST_DRAW,
    Digits,
    load_split,
    shifted,
    write_parquet,
)
from raymerge.demo.recipes import (
    METHODS,
    SEARCH_TRIALS,
    calibration_path,
    data_path,
    model_path,
    write_recipe,
    write_search,
)
from raymerge.demo.results import DemoResult, Row
from raymerge.demo.train import on_one_core, train_all
from raymerge.errors import OutputError

_MARK = "demo.json"


def run_demo(out: Path, *, workers: int | None = None, quiet: bool = False) -> DemoResult:
    """Run the demo in the folder `out`, print its table unless `quiet`, and return it.

    Below `out`: `data/` (test rows), `calibration/` (64 images a domain), `models/` (base and experts), `recipes/`,
    `merged/`, `search/`, and `demo.json`.
    `workers` bounds the tasks at once. Raises OutputError if `out` holds anything but an earlier demo.
    """
    from rich.console import Console

    begun = time.perf_counter()
    out = Path(out).absolute()
    _claim(out)
    with _progress(quiet, len(EXPERTS) + 1 + 2 * len(METHODS) + len(EXPERTS) + 3) as step:
        _write_data(out)
        train_all(out / "models", workers=workers, tell=lambda name: step(f"trained {name}"))
        rows = _measure_models(out, step)
        own = {name: rows[name].scores[name] for name in EXPERTS}
        for method in METHODS:
            rows[method] = _merge(out, method, own, workers, step)
        rows["search"] = _search(out, own, step)
    result = DemoResult(out=out, rows=tuple(rows.values()), elapsed_seconds=time.perf_counter() - begun)
    write_text(out / _MARK, result.to_json())
    if not quiet:
        console = Console()
        console.print(result.to_table())
        console.print(_epilogue(result), markup=False, highlight=False, soft_wrap=True)
    return result


def _claim(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARK).is_file())):
        raise OutputError(f"{out}: exists and holds no earlier demo; choose another folder")
    write_text(out / _MARK, "{}\n")


def _write_data(out: Path) -> None:
    train, test = load_split()
    for domain in DOMAINS:
        write_parquet(shifted(test, domain, TEST_DRAW), data_path(out, domain))
    for number, domain in enumerate(EXPERTS):
        rows = slice(number * NUM_CALIBRATION, (number + 1) * NUM_CALIBRATION)
        few = Digits(train.images[rows], train.labels[rows])
        write_parquet(shifted(few, domain, CALIBRATION_DRAW), calibration_path(out, domain))


def _measure_models(out: Path, step: Callable[[str], None]) -> dict[str, Row]:
    """Rows of the base and the experts."""
    recipe = write_recipe(out, next(iter(METHODS)))
    scores = {}
    for name in ("base", *EXPERTS):
        scores[name] = _scores(model_path(out, name), recipe)
        step(f"measured {name}")
    own = {name: scores[name][name] for name in EXPERTS}
    return {
        name: Row(
            name=name,
            kind="base" if name == "base" else "expert",
            path=model_path(out, name),
            scores=found,
            share_kept=_share(found, own),
        )
        for name, found in scores.items()
    }


def _merge(out: Path, method: str, own: Mapping[str, float], workers: int | None, step: Callable[[str], None]) -> Row:
    recipe = write_recipe(out, method)
    # For a model this small, starting a group of workers that learn takes longer than learning.
    learners = 1 if method == "prodistill" else workers
    place = out / "merged" / method
    merged = api.merge(recipe, place, workers=learners, overwrite=True)
    step(f"merged {method}")
    scores = _scores(place, recipe)
    step(f"measured {method}")
    return Row(
        name=method,
        kind="merge",
        path=place,
        scores=scores,
        share_kept=_share(scores, own),
        elapsed_seconds=merged.elapsed_seconds,
        peak_bytes=merged.peak_bytes,
    )


def _search(out: Path, own: Mapping[str, float], step: Callable[[str], None]) -> Row:
    """Task arithmetic with a coefficient for each expert, found by Ray Tune on the calibration images."""
    recipe = write_search(out)
    found = api.search(recipe, out / "search", overwrite=True)
    place = out / "search" / "merged"
    step("searched coefficients")
    scores = _scores(place, recipe)
    step("measured the best")
    return Row(
        name="search",
        kind="merge",
        path=place,
        scores=scores,
        share_kept=_share(scores, own),
        elapsed_seconds=found.facts["elapsed_seconds"],
    )


def _scores(model: Path, recipe: Path) -> dict[str, float]:
    with on_one_core():
        found = api.evaluate(model, recipe)
    return {name: task.score for name, task in found.tasks.items()}


def _share(scores: Mapping[str, float], own: Mapping[str, float]) -> float:
    """Mean over the experts' domains of the share of the expert's own score that is kept."""
    return sum(scores[name] / own[name] for name in own) / len(own)


def _epilogue(result: DemoResult) -> str:
    best, base = result.best, result.rows[0]
    command = shlex.join(["raymerge", "evaluate", str(best.path), str(result.out / "recipes" / f"{best.name}.yml")])
    return (
        "First the base, then its experts, then their merges. mean: over the experts' four domains; kept: mean share\n"
        "of the experts' own scores there; s and MB: time of the merge and peak memory of a worker.\n"
        f"Best merge: {best.name} keeps {best.share_kept:.0%}, mean {best.mean:.3f} (base: {base.mean:.3f}). It is an\n"
        f"ordinary checkpoint in\n  {best.path}\n"
        f"Measure it again with\n"
        f"  {command} --experts\n"
        f"search: a coefficient for each expert, by {SEARCH_TRIALS} trials on Ray Tune. Look at it with\n"
        f"  {shlex.join(['raymerge', 'report', str(result.out / 'search')])}\n"
        f"{result.elapsed_seconds:.0f} s in all."
    )


@contextmanager
def _progress(quiet: bool, total: int) -> Iterator[Callable[[str], None]]:
    """A bar with what was done last; nothing where no one looks."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("training", total=total)
        yield lambda done: bar.update(task, advance=1, description=done)
