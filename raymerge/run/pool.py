"""A pool runs one function over many items and yields results as they come; this one, in this process."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol, TypeVar

import torch

from raymerge.run.allocator import keep_freed_chunks

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool(Protocol):
    """Runs a function over items, several at a time."""

    device: str

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Yield (number of the item, result) in order of completion; the first error ends it."""
        ...


class LocalPool:
    """Threads of this process. torch's own threads are off while it works: items are the parallelism,
    and float sums must not depend on how many threads share them.
    """

    device = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        keep_freed_chunks()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(self.threads)
        try:
            futures = {pool.submit(function, item): number for number, item in enumerate(items)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
