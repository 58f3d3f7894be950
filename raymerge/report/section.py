"""What a page is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

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
