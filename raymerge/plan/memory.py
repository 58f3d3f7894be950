"""Predict what a worker's resident memory peaks at, and choose what it may hold.

A worker holds the libraries it imports, the chunks a method works on, and, where a method needs all of a
tensor or passes over it more than once, the tensor's inputs as they are stored.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import psutil

from raymerge.checkpoint.header import DTYPES
from raymerge.checkpoint.location import Location
from raymerge.checkpoint.remote import WINDOW
from raymerge.errors import MemoryBudgetError, RecipeError
from raymerge.methods.base import StatisticsMethod, TensorMethod
from raymerge.plan.execute import CHUNK
from raymerge.plan.schema import Call, PlannedTensor

# A Ray worker has grpc and Ray's own code beside torch: measured as what a worker that has imported
# this module and merged nothing holds, less what the planning process holds.
RAY_BYTES = 60_000_000

# What DeepSpeed and the parts of transformers that run models add: measured.
LEARNING_BYTES = 150_000_000

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str | int, where: str) -> int:
    """A number of bytes from `5GB`, `64MiB` or a plain number. Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-zA-Z]*)\s*", str(text))
    if not found or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise RecipeError(f"{where}: found {text!r}; a size is expected, as 5GB or 64MiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def baseline_bytes() -> int:
    """Resident memory of a worker before it works: what this process, with the same imports, holds now."""
    return int(psutil.Process().memory_info().rss) + RAY_BYTES


def baseline_of_learning() -> int:
    """Resident memory of a worker that learns before it works: with transformers, and on Ray DeepSpeed, imported."""
    return baseline_bytes() + LEARNING_BYTES


def machine_bytes() -> int:
    """Memory of this machine."""
    return int(psutil.virtual_memory().total)


def working_bytes(tensor: PlannedTensor, method: TensorMethod | None) -> int:
    """Memory that merging a tensor takes beside what is held: inputs of one chunk and the method's copies."""
    size = tensor.num_elements
    if method is None:
        return 2 * min(size, CHUNK) * 8
    unit = method.unit(tensor.shape)
    chunk = min(size, max(unit, CHUNK // unit * unit))
    arithmetic = DTYPES[tensor.arithmetic].itemsize
    inputs = sum(DTYPES[source.tensors[0].dtype].itemsize + arithmetic for source in tensor.sources)
    statistics = _statistics_bytes(tensor, method)
    return chunk * (inputs + 4 * method.scratch_copies(len(tensor.experts))) + statistics


def _statistics_bytes(tensor: PlannedTensor, method: TensorMethod) -> int:
    # Histograms of 65536 64-bit counts per expert, a few of them alive at once.
    needs = isinstance(method, StatisticsMethod) and method.rounds(DTYPES[tensor.arithmetic]) > 0
    return 4 * len(tensor.experts) * 65536 * 8 if needs else 0


def held_bytes(tensor: PlannedTensor) -> int:
    """Memory of all inputs of a tensor, as stored."""
    return tensor.num_elements * sum(DTYPES[source.tensors[0].dtype].itemsize for source in tensor.sources)


def reading_bytes(locations: Iterable[Location]) -> int:
    """Memory that what is read ahead from object storage takes."""
    return 2 * WINDOW * sum(location.is_remote for location in locations)


def fit(
    tensors: Sequence[PlannedTensor], calls: Sequence[Call], budget: int | None, baseline: int
) -> tuple[tuple[PlannedTensor, ...], int]:
    """Decide which tensors are held between passes, and predict a worker's peak in bytes, `baseline` included.

    Tensors of methods with several passes are held where the budget allows, else read once per pass.
    Raises MemoryBudgetError, naming the tensor, if the budget does not suffice even so.
    """
    methods = [call.build() for call in calls]
    peak = baseline
    fitted = []
    for tensor in tensors:
        method = None if tensor.call is None else methods[tensor.call]
        need = baseline + working_bytes(tensor, method)
        passes = (
            method.rounds(DTYPES[tensor.arithmetic])
            if isinstance(method, StatisticsMethod) and method.scope == "tensor"
            else 0
        )
        held = passes > 0 and (budget is None or need + held_bytes(tensor) <= budget)
        need += held_bytes(tensor) if held else 0
        if budget is not None and need > budget:
            assert method is not None or need == baseline + working_bytes(tensor, None)
            raise MemoryBudgetError(
                f"{tensor.name}: merging {tensor.shape} takes {need / 1e9:.2f} GB per worker, of which "
                f"{baseline / 1e9:.2f} GB are libraries; {budget / 1e9:.2f} GB are allowed: raise the memory, "
                f"or choose an elementwise method for this tensor"
            )
        peak = max(peak, need)
        fitted.append(replace(tensor, held=True) if held else tensor)
    return tuple(fitted), peak
