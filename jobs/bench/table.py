"""The rows of a benchmark, printed."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from rich.console import Console
from rich.table import Table


def show(rows: Sequence[Mapping[str, Any]], as_json: bool, *, digits: int = 2, device: str = "") -> None:
    """Print rows that have the same columns: as JSON, or as a table under the machine and the date."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    above = [platform.machine(), f"{os.cpu_count()} cores", device, date.today().isoformat()]
    table = Table(title=", ".join(part for part in above if part))
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(_cell(value, digits) for value in row.values()))
    Console(width=150).print(table)


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
