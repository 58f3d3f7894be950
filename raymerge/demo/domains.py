"""Real handwritten digits (scikit-learn's `load_digits`, 8 by 8 pixels), as they are and in four domains.

The domains conflict: what a pixel means in one says something else, or nothing, in another. An expert of
one fails on the others. Shapes: N images, H = W = 8 pixels.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NUM_CLASSES = 10
IMAGE_SIZE = 8
NUM_TEST = 540
SEED = 20
# The numbers of the noise of test and calibration images; training counts its epochs from 0.
TEST_DRAW = 999
CALIBRATION_DRAW = 998
# Images of each domain that ProDistill sees, without their labels; from those the experts were trained on.
NUM_CALIBRATION = 64

# Brightest noise, of 255. More of it and 64 pixels no longer show a digit.
NOISE = 160

# A domain's images from clean ones, (N, H, W) uint8; only noise draws from the generator.
Shift = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Digits:
    """Images, (N, H, W) uint8 with 255 as ink, and their digits, (N,) int64."""

    images: Tensor
    labels: Tensor


def load_split() -> tuple[Digits, Digits]:
    """The clean digits for training (1257) and for testing (540); the same split every time."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # Ink is 0 to 16 there.
    images = (torch.from_numpy(pixels).view(-1, IMAGE_SIZE, IMAGE_SIZE) * 255 / 16).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=_generator(SEED))
    split = len(images) - NUM_TEST
    digits = Digits(images[order], torch.from_numpy(labels)[order].long())
    return (
        Digits(digits.images[:split], digits.labels[:split]),
        Digits(digits.images[split:], digits.labels[split:]),
    )


def shifted(digits: Digits, domain: str, draw: int) -> Digits:
    """The same digits in a domain; every number `draw` gives noise of its own."""
    generator = _generator(1000 * SEED + draw)
    return Digits(DOMAINS[domain](digits.images, generator), digits.labels)


def write_parquet(digits: Digits, path: Path) -> None:
    """Columns `image` (PNG, as Hugging Face data sets store images) and `label`."""
    import pyarrow as pa
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": _png(image), "path": None} for image in digits.images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind), "label": pa.array(digits.labels.tolist(), pa.int64())}
    pyarrow.parquet.write_table(pa.table(columns), path)


def _png(image: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "PNG")
    return file.getvalue()


def _inverted(images: Tensor, _: torch.Generator) -> Tensor:
    return 255 - images


def _rotated(images: Tensor, _: torch.Generator) -> Tensor:
    return torch.rot90(images, 1, (1, 2))


def _permuted(images: Tensor, _: torch.Generator) -> Tensor:
    order = torch.randperm(IMAGE_SIZE**2, generator=_generator(SEED + 1))
    return images.flatten(1)[:, order].view_as(images)


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randint(NOISE + 1, images.shape, generator=generator, dtype=torch.uint8)
    return torch.maximum(images, noise)


def _clean(images: Tensor, _: torch.Generator) -> Tensor:
    return images


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The base's own domain, then the experts'.
CLEAN = "clean"
DOMAINS: Mapping[str, Shift] = {
    CLEAN: _clean,
    "inverted": _inverted,
    "rotated": _rotated,
    "permuted": _permuted,
    "noisy": _noisy,
}
EXPERTS = tuple(name for name in DOMAINS if name != CLEAN)
