"""The command line: each command parses, calls one verb, and prints with Rich."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from raymerge import __version__
from raymerge.errors import RayMergeError, UserError, nearest

if TYPE_CHECKING:
    from raymerge.api import MergeResult, SearchResult
    from raymerge.plan.forecast import Forecast
    from raymerge.plan.schema import Plan

Result = TypeVar("Result")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Merge fine-tuned checkpoints of one base into one, on a laptop or a Ray cluster.",
)
# Between two lines of progress where there is no terminal.
LINE_SECONDS = 15

out_console = Console()
err_console = Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(help="a recipe, ours or mergekit's", metavar="RECIPE")]
OutArgument = Annotated[str, typer.Argument(help="folder to write, or s3://..., gs://...", metavar="OUT")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no summary")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
Workers = Annotated[int | None, typer.Option(min=1, help="tasks at once; as many as fit by default")]
Memory = Annotated[str | None, typer.Option(help="most memory a worker may use, as 2GB")]


def _print_version(wanted: bool) -> None:
    if wanted:
        out_console.print(f"raymerge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="version")] = False,
) -> None:
    """Merge fine-tuned checkpoints of one base into one, on a laptop or a Ray cluster."""


@app.command()
def merge(
    recipe: RecipeArgument,
    out: OutArgument,
    local: Annotated[bool, typer.Option("--local", help="work in this process, without Ray")] = False,
    workers: Workers = None,
    memory: Memory = None,
    overwrite: Annotated[bool, typer.Option(help="replace an earlier output of RayMerge")] = False,
    quiet: Quiet = False,
) -> None:
    """Run any method and write a Hugging Face checkpoint."""

    def verb() -> "MergeResult":
        from raymerge import api

        return api.merge(
            recipe, out, local=local, workers=workers, memory=memory, overwrite=overwrite, progress=progress
        )

    if not quiet:
        _log_to_terminal()
    with _progress(quiet) as progress:
        result = _run(verb, local)
    if quiet:
        return
    for note in result.plan.notes:
        err_console.print(f"note: {note}", style="yellow", highlight=False, markup=False)
    there = f", {result.shards_resumed} of {len(result.plan.shards)} files were there" if result.shards_resumed else ""
    out_console.print(
        f"{result.out}: {result.plan.method} of {len(result.plan.models)} checkpoints, "
        f"{result.plan.cost.bytes_written / 1e9:.2f} GB, {result.elapsed_seconds:.1f} s, "
        f"peak {result.peak_bytes / 1e9:.2f} GB per process{there}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def plan(
    recipe: RecipeArgument,
    memory: Memory = None,
    nodes: Annotated[
        list[int] | None, typer.Option(min=1, help="say how long it takes on so many nodes; may be repeated")
    ] = None,
    workers_per_node: Annotated[int | None, typer.Option(min=1, help="for --nodes; 8 by default")] = None,
    disk: Annotated[str | None, typer.Option(help="bytes a second of a node's storage; 2GB by default")] = None,
    network: Annotated[str | None, typer.Option(help="bytes a second of a node's network; 3GB by default")] = None,
    memory_rate: Annotated[
        str | None,
        typer.Option(help="bytes a second a worker moves through memory as it merges; 1GB by default, as TIES does"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check everything, read only headers, print what a merge would do."""
    from raymerge import api

    asked = {"workers_per_node": workers_per_node, "disk": disk, "network": network, "memory_rate": memory_rate}
    rates: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if rates and not nodes:
        raise typer.BadParameter("rates are of nodes: say --nodes too")
    planned = api.plan(recipe, memory=memory)
    forecasts = api.forecast(planned, nodes, **rates) if nodes else ()
    if as_json:
        found = [{**asdict(one), "minutes": one.minutes, "bound": one.bound} for one in forecasts]
        print(json.dumps({**_plan_summary(planned), **({"forecasts": found} if found else {})}, indent=2))
    else:
        _print_plan(planned)
        _print_forecasts(forecasts)


@app.command()
def search(
    recipe: RecipeArgument,
    out: OutArgument,
    overwrite: Annotated[bool, typer.Option(help="replace an earlier output of RayMerge")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search settings on Ray Tune; write the best recipe, its checkpoint, and all trials."""

    def verb() -> "SearchResult":
        from raymerge import api

        return api.search(recipe, out, overwrite=overwrite, progress=progress)

    if not quiet:
        _log_to_terminal()
    with _progress(quiet) as progress:
        result = _run(verb)
    if as_json:
        print(json.dumps(result.facts, indent=2))
    elif not quiet:
        _print_search(result)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a merged folder, or any checkpoint", metavar="MODEL")],
    recipe: RecipeArgument,
    experts: Annotated[bool, typer.Option("--experts", help="measure each expert on its own task too")] = False,
    workers: Workers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on the recipe's evaluation tasks."""
    from raymerge import api

    with _progress(quiet) as progress:
        found = api.evaluate(model, recipe, experts=experts, workers=workers, progress=progress)
    if as_json:
        print(found.to_json())
    else:
        out_console.print(found.to_table())


@app.command()
def report(
    out: Annotated[str, typer.Argument(help="the output of a merge or a search", metavar="OUT")],
    measure: Annotated[bool, typer.Option(help="measure the recipe's evaluation tasks first")] = True,
) -> None:
    """Write OUT/report.html: scores, losses, coefficients, task vectors, trials, costs, on one page."""
    from raymerge import api

    _log_to_terminal()
    print(api.report(out, measure=measure))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="one method, in full")] = None) -> None:
    """The catalogue of methods, or one method's settings."""
    from raymerge import methods as catalogue

    if name is None:
        table = Table("method", "what it does", "needs a base", "experts")
        for known in catalogue.CATALOGUE:
            found = catalogue.find(known)
            least, most = found.num_experts
            count = str(least) if least == most else f"{least} to {most}" if most else f"{least} or more"
            table.add_row(known, _first_line(found), "yes" if found.needs_base else "no", count)
        out_console.print(table)
        return
    found = catalogue.find(name)
    out_console.print(sys.modules[found.__module__].__doc__ or "", markup=False, highlight=False)
    table = Table("setting", "default", "what it means")
    for row in catalogue.describe(found):
        table.add_row(*row)
    out_console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="folder to write", metavar="OUT")],
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Train four experts on real handwritten digits, merge them with many methods, compare; offline, minutes."""

    def verb() -> None:
        from raymerge.demo.demo import run_demo

        run_demo(out, workers=workers, quiet=quiet)

    from raymerge.run.cluster import run_beside_start

    run_beside_start(verb)


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help="a command of RayMerge", metavar="VERB")],
    address: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="dashboard, as http://HEAD:8265")],
    arguments: Annotated[list[str] | None, typer.Argument(help="its arguments", metavar="ARGS")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="print the job's id and leave")] = False,
) -> None:
    """Run a command as a job on a Ray cluster, and follow it; Ctrl-C leaves it running."""
    from raymerge.run.submit import submit as start

    job = start(address, verb, arguments or [], _parsed(context, verb, arguments or []))
    if detach:
        print(job.id)
        return
    _tell(f"{job.id} on {address}")
    try:
        code = job.follow(lambda lines: print(lines, end="", flush=True))
    except KeyboardInterrupt:
        _tell(f"{job.id} goes on\n{job.hint}")
        raise typer.Exit(130) from None
    if code:
        _tell(f"{job.id} ended with exit code {code}")
    raise typer.Exit(code)


def _parsed(context: typer.Context, verb: str, arguments: list[str]) -> dict[str, Any]:
    """What a command would be given, so that its mistakes end here."""
    group = context.find_root().command
    assert isinstance(group, TyperGroup)
    known = [name for name in group.commands if name != "submit"]
    if verb not in known:
        raise UserError(f"submit: {verb!r} is no command; {nearest(verb, known)}")
    return group.commands[verb].make_context(verb, list(arguments), parent=context.find_root()).params


def _tell(text: str) -> None:
    err_console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _run(verb: Callable[[], Result], local: bool = False) -> Result:
    """Call a verb, unless it is `local` while Ray starts: both take seconds before they do anything."""
    try:
        if local:
            return verb()
        from raymerge.run.cluster import run_beside_start

        return run_beside_start(verb)
    except KeyboardInterrupt:
        _tell("stopped; the same command goes on from here")
        raise


def _log_to_terminal() -> None:
    """Show what long work says of itself, a line at a time."""
    from rich.logging import RichHandler

    logger = logging.getLogger("raymerge")
    logger.setLevel(logging.INFO)
    logger.addHandler(
        RichHandler(console=err_console, show_path=False, show_level=False, highlighter=NullHighlighter())
    )


def _first_line(found: type) -> str:
    return (found.__doc__ or "").strip().partition("\n")[0].replace("`", "")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on a terminal; elsewhere, as in the log of a job, a line now and then."""
    if quiet:
        yield None
        return
    if not err_console.is_terminal:
        yield _lines()
        return
    texts = TextColumn("{task.description}")
    columns = (SpinnerColumn(), texts, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err_console, transient=True) as bars:
        task = bars.add_task("planning", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield tell


def _lines() -> Callable[[str, int, int], None]:
    """Progress for a file: a line at most every LINE_SECONDS while there is more to do; short work says nothing."""
    due = time.monotonic() + LINE_SECONDS

    def tell(what: str, done: int, total: int) -> None:
        nonlocal due
        if done < total and time.monotonic() >= due:
            due = time.monotonic() + LINE_SECONDS
            err_console.print(f"{what}: {done} of {total}", markup=False, highlight=False)

    return tell


def _plan_summary(planned: "Plan") -> dict[str, Any]:
    """The plan without its tensors, for programs."""
    return {
        "method": planned.method,
        "models": [{"name": model.name, "place": str(model.location)} for model in planned.models],
        "num_tensors": planned.num_tensors,
        "shards": [{"file": shard.file, "num_tensors": len(shard.tensors)} for shard in planned.shards],
        "settings": [dict(call.settings) for call in planned.calls],
        **asdict(planned.cost),
        **({"fits_here": planned.cost.fits_here} if planned.cost.units else {}),
        "notes": list(planned.notes),
        "digest": planned.digest,
    }


def _print_plan(planned: "Plan") -> None:
    cost = planned.cost
    table = Table(show_header=False)
    table.add_row("method", planned.method)
    for model in planned.models:
        table.add_row(model.name, str(model.location))
    table.add_row("tensors", f"{planned.num_tensors} in {len(planned.shards)} files")
    table.add_row("read", f"{cost.bytes_read / 1e9:.3f} GB")
    table.add_row("written", f"{cost.bytes_written / 1e9:.3f} GB")
    table.add_row(
        "peak memory per worker",
        f"{cost.peak_bytes_per_worker / 1e9:.2f} GB, of which {cost.baseline_bytes / 1e9:.2f} GB are libraries",
    )
    for number, call in enumerate(planned.calls[:5]):
        settings = ", ".join(f"{key} {_shown(value)}" for key, value in call.settings.items())
        table.add_row("settings" if number == 0 else "", settings)
    if len(planned.calls) > 5:
        table.add_row("", f"and {len(planned.calls) - 5} more sets, by depth and filter")
    out_console.print(table)
    _print_units(planned)
    shards = Table("file", "tensors", "first", "last")
    for shard in planned.shards:
        names = [tensor.name for tensor in shard.tensors]
        shards.add_row(shard.file, str(len(names)), names[0], names[-1])
    out_console.print(shards)
    for note in planned.notes:
        out_console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def _print_units(planned: "Plan") -> None:
    """What is learned, one row for units of equal size."""
    if not planned.cost.units:
        return
    table = Table("fitted", "parameters", "state GB", "frozen GB", "step GB", "cache GB", "per worker GB")
    sizes: dict[tuple[int, ...], list[str]] = {}
    for unit in planned.cost.units:
        costs = (unit.num_parameters, unit.state_bytes, unit.frozen_bytes, unit.step_bytes, unit.cache_bytes)
        sizes.setdefault((*costs, unit.total_bytes), []).append(unit.name)
    for (parameters, *found), names in sizes.items():
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
        table.add_row(shown, f"{parameters / 1e6:.2f} M", *(f"{size / 1e9:.2f}" for size in found))
    out_console.print(table)
    cost = planned.cost
    needed, here = cost.num_learners * cost.peak_bytes_per_worker / 1e9, cost.machine_bytes / 1e9
    verdict = (
        "it fits" if cost.fits_here else "it does not fit here: more machines, or compute.zero_stage, stages, offload"
    )
    out_console.print(
        f"{cost.num_learners} workers peak at {needed:.2f} GB, this machine has {here:.2f} GB: {verdict}",
        highlight=False,
    )


def _print_forecasts(forecasts: "Sequence[Forecast]") -> None:
    if not forecasts:
        return
    table = Table("nodes", "busy workers", "files", "read GB", "written GB", "minutes", "bound by", "worker GB")
    for one in forecasts:
        table.add_row(
            str(one.num_nodes),
            f"{one.num_busy} of {one.num_nodes * one.node.workers}",
            str(one.num_shards),
            f"{one.bytes_read / 1e9:.1f}",
            f"{one.bytes_written / 1e9:.1f}",
            f"{one.minutes:.1f}",
            one.bound,
            f"{one.peak_bytes_per_worker / 1e9:.2f}",
        )
    out_console.print(table)
    node = forecasts[0].node
    out_console.print(
        f"files and bytes of the busiest node; a node's disk moves {node.disk / 1e9:g} GB/s, its network "
        f"{node.network / 1e9:g} GB/s, each worker {node.memory / 1e9:g} GB/s in memory",
        highlight=False,
    )
    for part in forecasts[0].left_out:
        out_console.print(f"not in the minutes: {part}", style="yellow", markup=False, highlight=False)


def _print_search(result: "SearchResult") -> None:
    facts = result.facts
    table = Table(show_header=False)
    table.add_row("trials", f"{facts['num_trials']}, {facts['num_failed']} of them failed, by {facts['searcher']}")
    for name, value in facts["best"]["values"].items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    for name, value in facts["objectives"].items():
        table.add_row(f"{name}, on validation data", f"{value:.4f}")
    for name, found in (facts["test"] or {"tasks": {}})["tasks"].items():
        table.add_row(f"{name}, on test data", f"{found['score']:.4f}")
    out_console.print(table)
    out_console.print(f"{result.out}/best.yml, merged, trials.parquet", markup=False, highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    return ", ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value)


def main() -> None:
    """The `raymerge` command. `--debug` anywhere shows the traceback of an error."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except SystemExit as done:
        _leave(done.code if isinstance(done.code, int) else int(done.code is not None))
    except RayMergeError as problem:
        if debug:
            raise
        said = f"{type(problem).__name__}: {problem}"
        err_console.print(said, style="red", markup=False, highlight=False, soft_wrap=True)
        _leave(problem.exit_code)


def _leave(code: int) -> NoReturn:
    """End the process without tearing down torch and Ray, which takes two seconds and changes nothing:
    all files are closed, and a Ray started here ends with its driver.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
