"""A report as one HTML file that needs nothing else: no scripts, no fonts or pictures from elsewhere."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from raymerge.checkpoint.writer import write_text
from raymerge.report.collect import collect
from raymerge.report.section import Section

PICTURES = "raymerge/pictures"


def write_report(out: Path, name: str) -> Path:
    """Write `report.html`, titled `name`, into an output folder, and its pictures as files; returns the page's path.

    Raises RayMergeError if the folder is no output of RayMerge.
    """
    sections = collect(out)
    for section in sections:
        for picture in section.pictures:
            picture.save(out / PICTURES)
    page = out / "report.html"
    write_text(page, render(name, sections))
    return page


def render(name: str, sections: Sequence[Section]) -> str:
    """The page; whatever comes from recipes, checkpoints and errors is escaped."""
    environment = Environment(
        loader=PackageLoader("raymerge", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(name=name, sections=sections)
