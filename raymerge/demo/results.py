"""What the demo found: a row per model, as a table and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.demo.domains import DOMAINS, EXPERTS

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Accuracy of one model by domain; for a merge also what it took."""

    name: str
    kind: str
    path: Path
    scores: Mapping[str, float]
    share_kept: float
    elapsed_seconds: float | None = None
    peak_bytes: int | None = None

    @property
    def mean(self) -> float:
        """Mean accuracy over the experts' domains."""
        return sum(self.scores[domain] for domain in EXPERTS) / len(EXPERTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """The base, the experts and every merge, measured on every domain."""

    out: Path
    rows: Sequence[Row]
    elapsed_seconds: float

    @property
    def best(self) -> Row:
        """The merge with the highest mean."""
        return max((row for row in self.rows if row.kind == "merge"), key=lambda row: row.mean)

    def to_json(self) -> str:
        rows = [asdict(row) | {"path": str(row.path), "mean": row.mean} for row in self.rows]
        found = {"best": str(self.best.path), "elapsed_seconds": self.elapsed_seconds, "rows": rows}
        return json.dumps(found, indent=2) + "\n"

    def to_table(self) -> "Table":
        """A Rich table; the best merge is bold."""
        from rich.box import SIMPLE
        from rich.table import Table

        table = Table(title="accuracy on handwritten digits, by domain", box=SIMPLE, padding=0)
        table.add_column("model", no_wrap=True)
        for name in (*DOMAINS, "mean", "kept", "s", "MB"):
            table.add_column(name, justify="right", no_wrap=True)
        kind = self.rows[0].kind
        for row in self.rows:
            if row.kind != kind:
                table.add_section()
                kind = row.kind
            table.add_row(
                row.name,
                *(f"{row.scores[domain]:.3f}" for domain in DOMAINS),
                f"{row.mean:.3f}",
                f"{row.share_kept:.0%}",
                "" if row.elapsed_seconds is None else f"{row.elapsed_seconds:.1f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
                style="bold" if row == self.best else None,
            )
        return table
