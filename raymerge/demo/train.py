"""Train the demo's base on clean digits, and an expert of each domain from the base, in seconds each.

Every draw has its own seeded generator and every model one core, so that results depend neither on how
many are trained at once nor on the number of cores.
"""

import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raymerge.demo.domains import CLEAN, EXPERTS, IMAGE_SIZE, NUM_CLASSES, Digits, load_split, shifted
from raymerge.models.small import normalise, save_vision_classifier, small_vision_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Wide and flat: the wider a model, the less its experts' task vectors get in each other's way.
HIDDEN_SIZE, NUM_BLOCKS, PATCH_SIZE = 256, 3, 4
BATCH_SIZE = 64
BASE_EPOCHS, BASE_LR = 10, 1e-3
EXPERT_EPOCHS, EXPERT_LR = 8, 2e-4


def train_all(
    folder: Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    base_epochs: int = BASE_EPOCHS,
    expert_epochs: int = EXPERT_EPOCHS,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the checkpoints `folder/base` and `folder/<domain>` for each domain.

    `workers` experts are trained at once (None: as many as there are cores); `tell` hears which are done.
    """
    train, _ = load_split()
    base = small_vision_classifier(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_blocks=NUM_BLOCKS,
        num_labels=NUM_CLASSES,
        seed=seed,
    )
    fit(base, train, CLEAN, epochs=base_epochs, lr=BASE_LR, seed=seed)
    save_vision_classifier(base, folder / "base")
    tell("base")

    def train_expert(domain: str) -> "PreTrainedModel":
        expert = copy.deepcopy(base)
        fit(expert, train, domain, epochs=expert_epochs, lr=EXPERT_LR, seed=seed + 1)
        return expert

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for domain, expert in zip(EXPERTS, pool.map(train_expert, EXPERTS), strict=True):
            save_vision_classifier(expert, folder / domain)
            tell(domain)


def fit(model: "PreTrainedModel", digits: Digits, domain: str, *, epochs: int, lr: float, seed: int) -> None:
    """Train a classifier on digits shifted to a domain, with AdamW and one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    num_steps = len(digits.labels) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * num_steps)
    model.train()
    with on_one_core():
        for epoch in range(epochs):
            # New noise every epoch: test images have noise of their own.
            images = normalise(shifted(digits, domain, draw=epoch).images)
            order = torch.randperm(len(images), generator=generator)
            for batch in order[: num_steps * BATCH_SIZE].view(num_steps, BATCH_SIZE):
                logits = model(pixel_values=images[batch]).logits
                loss = torch.nn.functional.cross_entropy(logits, digits.labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    model.eval()


@contextmanager
def on_one_core() -> Iterator[None]:
    """Have this thread's torch use one core: these matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
