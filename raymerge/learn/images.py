"""Make an image out of a cell of a data file.

A cell holds an encoded image (bytes, or a dict with `bytes` as Hugging Face data sets store them), or its
pixels as nested lists of whole numbers 0 to 255: (H, W), (H, W, C) or (C, H, W) with C 1 or 3.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from raymerge.errors import RecipeError


def decode_image(cell: Any, num_channels: int, where: str) -> Image.Image:
    """The image of a cell, grey for one channel, else RGB. Raises RecipeError saying `where`."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    image = _from_bytes(cell, where) if isinstance(cell, bytes) else _from_pixels(cell, where)
    return image.convert("L" if num_channels == 1 else "RGB")


def to_pixels(processor: Any, cells: Sequence[Any], num_channels: int, where: str, numbers: Sequence[int]) -> Tensor:
    """What a model reads of some cells, (B, C, H, W); `numbers` are their rows'.

    Raises RecipeError if one is no image, or if the processor refuses them.
    """
    images = [decode_image(cell, num_channels, f"{where}, row {row}") for row, cell in zip(numbers, cells, strict=True)]
    try:
        pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    except ValueError as problem:
        sizes = ", ".join(sorted({f"{image.width} x {image.height}" for image in images}))
        raise RecipeError(
            f"{where}: the model's image processor refuses images of {sizes}: {problem}; one size is expected where it "
            f"does not resize"
        ) from None
    return pixels


def _from_bytes(encoded: bytes, where: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
        return image
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as problem:
        raise RecipeError(f"{where}: the image cannot be decoded: {problem}") from None


def _from_pixels(cell: Any, where: str) -> Image.Image:
    expected = "encoded bytes, or pixels 0 to 255 as (H, W), (H, W, C) or (C, H, W) are expected"
    try:
        pixels = np.asarray(cell, dtype=np.float64)
    except (TypeError, ValueError):
        raise RecipeError(f"{where}: found {type(cell).__name__}; {expected}") from None
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.size == 0 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise RecipeError(f"{where}: found pixels of shape {pixels.shape}; {expected}")
    # Numbers between 0 and 1 could be scaled pixels or a black image: not for us to guess.
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 255 and (pixels % 1 == 0).all()):
        raise RecipeError(f"{where}: found pixels from {pixels.min()} to {pixels.max()}; {expected}")
    return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))
