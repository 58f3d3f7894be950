"""The pictures of a report, each drawn from plain numbers with matplotlib."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from raymerge.checkpoint.writer import replacing

WIDTH = 8.0
COLOURS = ("#3366cc", "#dc7633", "#2e8b57", "#a23b72", "#7d6608", "#5d6d7e", "#117a8b", "#922b21")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure with the name of its files and a caption that says what it shows."""

    name: str
    caption: str
    figure: Figure

    @property
    def data_uri(self) -> str:
        """The figure as SVG, for an `img`: no script in it runs, and nothing in it is markup of the page."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()

    def save(self, folder: Path) -> None:
        """Write it as PNG and SVG. Raises StorageError."""
        for kind in ("png", "svg"):
            with replacing(folder / f"{self.name}.{kind}") as temporary:
                self.figure.savefig(temporary, format=kind, dpi=150)


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def bars(
    name: str, caption: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], label: str
) -> Picture:
    """Bars side by side, one group a task, one colour a series; None leaves a gap."""
    figure = _figure(3.2)
    axes = figure.subplots()
    width = 0.8 / max(1, len(series))
    for number, (title, values) in enumerate(series.items()):
        at = [i + (number - (len(series) - 1) / 2) * width for i in range(len(groups))]
        axes.bar(at, [value or 0.0 for value in values], width, label=title, color=COLOURS[number % len(COLOURS)])
    crowded = sum(map(len, groups)) > 60
    axes.set_xticks(range(len(groups)), groups, rotation=15 if crowded else 0, ha="right" if crowded else "center")
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False)
    return Picture(name=name, caption=caption, figure=figure)


def curves(name: str, caption: str, lines: Mapping[str, Sequence[float]], across: str, label: str) -> Picture:
    """Lines on a logarithmic scale, from light to dark in their order."""
    figure = _figure(3.6)
    axes = figure.subplots()
    shades = _shades(len(lines))
    for shade, (title, values) in zip(shades, lines.items(), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=shade, label=title, linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(lines) <= 12:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Picture(name=name, caption=caption, figure=figure)


def heat_map(
    name: str,
    caption: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    low: float | None = None,
    high: float | None = None,
) -> Picture:
    """Numbers as colours, written in their cells where there is room."""
    figure = _figure(min(10.0, 1.2 + 0.3 * len(rows)))
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set_yticks(range(len(rows)), rows, fontsize="small")
    axes.set_xticks(range(len(columns)), columns)
    if len(rows) * len(columns) <= 150:
        flat = [value for row in values for value in row]
        middle = (min(flat) + max(flat)) / 2
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = "white" if value < middle else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="small")
    figure.colorbar(image, ax=axes, pad=0.02)
    return Picture(name=name, caption=caption, figure=figure)


def histogram(name: str, caption: str, edges: Sequence[float], counts: Mapping[str, Sequence[float]]) -> Picture:
    """Shares of values between edges, a line a series."""
    figure = _figure(3.0)
    axes = figure.subplots()
    for number, (title, found) in enumerate(counts.items()):
        axes.stairs(list(found), list(edges), label=title, color=COLOURS[number % len(COLOURS)], linewidth=1.4)
    axes.set_xlabel("coefficient")
    axes.set_ylabel("share of entries")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return Picture(name=name, caption=caption, figure=figure)


def profiles(name: str, caption: str, places: Sequence[str], series: Mapping[str, Sequence[float]]) -> Picture:
    """Lines over the blocks in order."""
    figure = _figure(3.2)
    axes = figure.subplots()
    for number, (title, values) in enumerate(series.items()):
        axes.plot(range(len(places)), values, marker="o", label=title, color=COLOURS[number % len(COLOURS)])
    every = max(1, len(places) // 12)
    axes.set_xticks(range(0, len(places), every), list(places)[::every], rotation=30, ha="right", fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return Picture(name=name, caption=caption, figure=figure)


def history(name: str, caption: str, values: Sequence[float | None], lower: bool, label: str) -> Picture:
    """A point for each trial and the best so far."""
    figure = _figure(3.0)
    axes = figure.subplots()
    found = [(number, value) for number, value in enumerate(values) if value is not None]
    best: list[float] = []
    for _, value in found:
        better = value if not best else (min(best[-1], value) if lower else max(best[-1], value))
        best.append(better)
    axes.plot([n for n, _ in found], [v for _, v in found], "o", color=COLOURS[0], alpha=0.6, label="trial")
    axes.step([n for n, _ in found], best, where="post", color=COLOURS[1], label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return Picture(name=name, caption=caption, figure=figure)


def front(
    name: str, caption: str, points: Sequence[tuple[float, float]], on_front: Sequence[bool], labels: tuple[str, str]
) -> Picture:
    """Two objectives against each other, the Pareto front joined."""
    figure = _figure(3.6)
    axes = figure.subplots()
    axes.plot([x for x, _ in points], [y for _, y in points], "o", color=COLOURS[5], alpha=0.5, label="trial")
    best = sorted(point for point, is_best in zip(points, on_front, strict=True) if is_best)
    axes.plot([x for x, _ in best], [y for _, y in best], "o-", color=COLOURS[1], label="Pareto front")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return Picture(name=name, caption=caption, figure=figure)


def _shades(count: int) -> list[str]:
    """From light to dark blue."""
    shares = [i / max(1, count - 1) for i in range(count)]
    return [f"#{int(158 - 128 * s):02x}{int(202 - 140 * s):02x}{int(225 - 105 * s):02x}" for s in shares]
