"""Small families of models with samples, and their recipes."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from architectures import FAMILIES, save
from tiny import make_bert, save_tokenizer, words


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


def make_any_family(folder: Path, name: str) -> dict[str, Any]:
    """A recipe of a base and two experts with samples of what the family reads."""
    for seed, model in ((0, "base"), (1, "a"), (2, "b")):
        save(name, folder / model, seed)
        save_tokenizer(folder / model, {token: i for i, token in enumerate(words(48))})
    generator = torch.Generator().manual_seed(5)
    if name in ("vit", "clip_vision_model"):
        channels = FAMILIES[name][1]["num_channels"]
        means = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
        config = {"image_processor_type": "ViTImageProcessor", "do_resize": False, **means}
        (folder / "base" / "preprocessor_config.json").write_text(json.dumps(config))
        pixels = torch.randint(0, 256, (12, 8, 8, channels), generator=generator)
        table = pa.table({"image": pixels.squeeze(-1).tolist()})
    else:
        ids = [torch.randint(5, 48, (4 + i % 7,), generator=generator).tolist() for i in range(12)]
        table = pa.table({"input_ids": ids})
    pq.write_table(table, folder / "samples.parquet")
    experts = {m: {"path": str(folder / m), "calibration": str(folder / "samples.parquet")} for m in ("a", "b")}
    return {"base": str(folder / "base"), "experts": experts}
