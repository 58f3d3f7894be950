"""Execute one shard of a plan: stream chunks from the checkpoints through the method into one file.

`merge_shard` is the one function every runner calls; `measure_shard` serves methods whose statistics
cover the whole model. A chunk is sized to stay in a core's cache through all steps of a method, and
its size is part of the numbers (float sums are added up per chunk), so it never depends on workers.
"""

import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from raymerge.checkpoint.header import DTYPES
from raymerge.checkpoint.place import OutputPath
from raymerge.checkpoint.reader import Reader, is_finite, open_reader
from raymerge.checkpoint.writer import TensorWriter, open_shard
from raymerge.errors import NonFiniteTensor, RayMergeError
from raymerge.methods.base import StatisticsMethod, TensorMethod, begin, shaped
from raymerge.ops.randomness import Draws
from raymerge.plan.schema import PlannedTensor, ShardJob, Source

CHUNK = 1 << 18
CHUNK_ON_GPU = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardReport:
    """What writing a shard took. `peak_bytes` is the largest resident memory of the process so far."""

    file: str
    bytes_read: int
    bytes_written: int
    elapsed_seconds: float
    peak_bytes: int


def merge_shard(
    job: ShardJob, folder: OutputPath, known: Any = None, fitted: Mapping[str, Tensor] | None = None
) -> ShardReport:
    """Write one shard below `folder`, on a disk or object storage, whole or not at all.

    `known` are the statistics of the whole model, for methods with scope `model`; `fitted` are tensors by name that
    were learned, and are written as they are. Raises StorageError,
    NonFiniteTensor, or RayMergeError naming the tensor.
    """
    begun = time.perf_counter()
    with open_reader(job.locations) as reader, open_shard(folder / job.shard.file, job.shard.layout) as writer:
        _merge_all(job, reader, writer, known, fitted or {})
        bytes_read = reader.bytes_read
    return ShardReport(
        file=job.shard.file,
        bytes_read=bytes_read,
        bytes_written=writer.bytes_written,
        elapsed_seconds=time.perf_counter() - begun,
        peak_bytes=peak_bytes(),
    )


def merge_into(tensors: Mapping[str, Tensor], job: ShardJob, known: Any = None) -> None:
    """Merge a shard into tensors that are there, by name, with the dtypes of the plan: the bytes of the file.

    Raises as `merge_shard` does; tensors may then be half changed.
    """
    with open_reader(job.locations) as reader:
        _merge_all(job, reader, _MemoryWriter(tensors), known, {})


def _merge_all(job: ShardJob, reader: Reader, writer: TensorWriter, known: Any, fitted: Mapping[str, Tensor]) -> None:
    methods = {number: call.build() for number, call in job.calls.items()}
    for tensor in job.shard.tensors:
        if tensor.name in fitted:
            _write_fitted(tensor, fitted[tensor.name], writer)
        elif tensor.call is None:
            _copy(tensor, reader, writer)
        else:
            _merge(_Stream(tensor, methods[tensor.call], reader, job), writer, known)


class _MemoryWriter:
    """Writes where a file is not wanted."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.bytes_written = 0

    def write(self, name: str, first: int, entries: Tensor) -> None:
        flat = entries.flatten()
        self._tensors[name].view(-1)[first : first + len(flat)] = flat
        self.bytes_written += flat.nbytes


def measure_shard(job: ShardJob, known: Any = None) -> Tensor | None:
    """One round of whole-model statistics over the merged tensors of a shard; None if it has none."""
    methods = {number: call.build() for number, call in job.calls.items()}
    total: Tensor | None = None
    with open_reader(job.locations) as reader:
        for tensor in job.shard.tensors:
            if tensor.call is not None and tensor.num_elements:
                method = methods[tensor.call]
                assert isinstance(method, StatisticsMethod)
                part = _measure(_Stream(tensor, method, reader, job), method, known)
                total = part if total is None else total + part
    return total


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    # Second best: a process takes it over from the one that has started it. In bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Stream:
    """The chunks of one tensor, read in order as often as asked, in the dtype of the arithmetic."""

    def __init__(self, tensor: PlannedTensor, method: TensorMethod, reader: Reader, job: ShardJob) -> None:
        self.tensor = tensor
        self.method = method
        self.dtype = DTYPES[tensor.arithmetic]
        self._reader = reader
        self._job = job
        self._size = tensor.num_elements
        self._unit = method.unit(tensor.shape)
        chunk = CHUNK if job.device == "cpu" else CHUNK_ON_GPU
        self._step = max(self._unit, chunk // self._unit * self._unit)
        expect(reader, tensor.sources)
        self._held = [read_source(reader, source, 0, self._size) for source in tensor.sources] if tensor.held else None

    def chunks(self) -> Iterator[tuple[int, Tensor | None, list[Tensor]]]:
        """First entry, base and experts of each chunk."""
        for first in range(0, self._size, self._step):
            count = min(self._step, self._size - first)
            inputs = [
                shaped(self._read(i, first, count), self._unit, self.tensor.shape)
                for i in range(len(self.tensor.sources))
            ]
            if self.tensor.base is None:
                yield first, None, inputs
            else:
                yield first, inputs[0], inputs[1:]

    def _read(self, source: int, first: int, count: int) -> Tensor:
        if self._held is not None:
            stored = self._held[source][first : first + count]
        else:
            stored = read_source(self._reader, self.tensor.sources[source], first, count)
        return stored.to(self._job.device, self.dtype)

    def require_finite_inputs(self) -> None:
        """Raise NonFiniteTensor if an input of the tensor holds NaN or infinity, naming file and tensor."""
        for source in self.tensor.sources:
            for first in range(0, self._size, CHUNK):
                if not is_finite(read_source(self._reader, source, first, min(CHUNK, self._size - first))):
                    raise NonFiniteTensor(_non_finite(self._reader, source))

    def explain_non_finite(self) -> NoReturn:
        """Say why the result is not finite: an input is not, or the arithmetic overflowed."""
        self.require_finite_inputs()
        raise NonFiniteTensor(
            f"{self.tensor.name}: the inputs are finite, the result is not: it overflows {self.tensor.arithmetic} "
            f"or {self.tensor.dtype}; use smaller coefficients, or float32"
        )

    def draws(self) -> tuple[list[Draws], ...]:
        """Fresh random streams for one pass, for methods that draw."""
        if not self.method.random:
            return ()
        return ([Draws(self._job.seed, self.tensor.name, source.name) for source in self.tensor.experts],)


def _measure(stream: _Stream, method: StatisticsMethod, known: Any) -> Tensor:
    drawn, state = stream.draws(), method.start(known)
    total: Tensor | None = None
    for _, base, experts in stream.chunks():
        part = method.measure(base, experts, state, *drawn)
        total = part if total is None else total + part
    assert total is not None
    return total


def _merge(stream: _Stream, writer: TensorWriter, known: Any) -> None:
    method, name, dtype = stream.method, stream.tensor.name, DTYPES[stream.tensor.dtype]
    try:
        if isinstance(method, StatisticsMethod) and method.scope == "tensor" and stream.tensor.num_elements:
            for _ in range(method.rounds(stream.dtype)):
                known = method.conclude(_measure(stream, method, known), known, stream.dtype)
        drawn, begun = stream.draws(), begin(method, known)
        for first, base, experts in stream.chunks():
            merged = method.merge(base, experts, *begun, *drawn).to("cpu", dtype)
            # NaN and infinity survive every method, so looking at what comes out is enough.
            if not is_finite(merged):
                stream.explain_non_finite()
            writer.write(name, first, merged)
    except (ValueError, RuntimeError) as problem:
        stream.require_finite_inputs()
        raise RayMergeError(f"{name}: merging failed: {problem}") from problem


def _write_fitted(tensor: PlannedTensor, fitted: Tensor, writer: TensorWriter) -> None:
    written = fitted.to(DTYPES[tensor.dtype])
    if not is_finite(written):
        raise NonFiniteTensor(f"{tensor.name}: what was learned overflows {tensor.dtype}; lower settings.lr")
    writer.write(tensor.name, 0, written)


def _copy(tensor: PlannedTensor, reader: Reader, writer: TensorWriter) -> None:
    assert tensor.base is not None
    for first in range(0, tensor.num_elements, CHUNK):
        entries = read_source(reader, tensor.base, first, min(CHUNK, tensor.num_elements - first))
        written = entries.to(DTYPES[tensor.dtype])
        if not is_finite(written):
            if not is_finite(entries):
                raise NonFiniteTensor(_non_finite(reader, tensor.base))
            raise NonFiniteTensor(f"{tensor.name}: overflows {tensor.dtype}; set output.dtype to a wider one")
        writer.write(tensor.name, first, written)


def _non_finite(reader: Reader, source: Source) -> str:
    places = ", ".join(reader.where(tensor) for tensor in source.tensors)
    return f"{places}: holds NaN or infinity; repair or leave out this checkpoint"


def expect(reader: Reader, sources: Iterable[Source]) -> None:
    """Begin to fetch sources that are read next, all at once; aligned ones begin at rows that are not known here."""
    reader.expect(source.tensors[0] for source in sources if source.rows is None)


def read_source(reader: Reader, source: Source, first: int, count: int) -> Tensor:
    """`count` flat entries of a source from entry `first` on; aligned sources are put together by row."""
    if source.rows is None:
        return reader.read(source.tensors[0], first, count)
    width = prod(source.tensors[0].shape[1:])
    dtype = DTYPES[source.tensors[0].dtype]
    entries = torch.zeros(count, dtype=dtype)
    for run in source.rows:
        # The overlap of the wanted range with this run, in entries of the aligned tensor.
        start = max(first, run.first * width)
        stop = min(first + count, (run.first + run.num_rows) * width)
        if start >= stop or not run.parts:
            continue
        offset = start - run.first * width
        parts = [reader.read(source.tensors[model], row * width + offset, stop - start) for model, row in run.parts]
        mean = parts[0] if len(parts) == 1 else torch.stack([p.float() for p in parts]).mean(0)
        entries[start - first : stop - first] = mean.to(dtype)
    return entries
