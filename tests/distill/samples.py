"""A small family of text models with samples, and its recipe."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tiny import make_bert


def make_family(folder: Path, **settings: Any) -> dict[str, Any]:
    """A headless BERT and two classifiers made from it, with texts of many lengths; `settings` are prodistill's."""
    make_bert(folder / "base")
    experts = {}
    for seed, (name, labels) in enumerate((("a", 2), ("b", 3)), start=1):
        make_bert(folder / name, seed, with_head=labels)
        texts = [" ".join(f"w{(7 * i + j + seed) % 28}" for j in range(2 + i % 9)) for i in range(22)]
        pq.write_table(pa.table({"text": texts, "label": list(range(22))}), folder / f"{name}.parquet")
        experts[name] = {"path": str(folder / name), "calibration": str(folder / f"{name}.parquet")}
    return {
        "base": str(folder / "base"),
        "experts": experts,
        "method": "prodistill",
        "settings": {"epochs": 4, "batch_size": 6, "samples": 20, "max_length": 12, "fit_tail": True, **settings},
    }
