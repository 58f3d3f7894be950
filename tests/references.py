"""Naive float64 references of the merging methods, written from the papers: whole tensors, sorts, loops.

Nothing of raymerge is used here, so that agreement means something.
"""

import numpy as np
import torch

Array = np.ndarray


def family(shape: tuple[int, ...], num_experts: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A base and experts near it, as tensors of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    experts = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(num_experts)]
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def doubles(*tensors: torch.Tensor) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


def deltas(base: torch.Tensor, experts: list[torch.Tensor]) -> list[Array]:
    """Task vectors, each rounded once to the experts' dtype: the numbers that are ranked."""
    return [(expert - base).double().numpy() for expert in experts]


def stable_ranks(magnitude: Array) -> Array:
    """Rank of each entry counted upwards, equal entries in order of position."""
    order = np.argsort(magnitude, kind="stable")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return ranks


def keep_largest(delta: Array, density: float) -> Array:
    """The `max(1, int(density n))` largest entries; of equal ones the first."""
    flat = delta.ravel()
    count = max(1, int(density * flat.size))
    order = np.argsort(-np.abs(flat), kind="stable")
    kept = np.zeros_like(flat)
    kept[order[:count]] = flat[order[:count]]
    return kept.reshape(delta.shape)


def keep_band(delta: Array, density: float, gamma: float) -> Array:
    flat = delta.ravel()
    target, top = int(density * flat.size), int(gamma * flat.size)
    low = max(0, flat.size - target - top)
    ranks = stable_ranks(np.abs(flat))
    return np.where((ranks >= low) & (ranks < low + target), flat, 0).reshape(delta.shape)


def elect_and_merge(entries: list[Array], terms: list[float] | None) -> Array:
    """Sum of the entries that agree with the sign of the sum (zero elects plus), over their terms."""
    merged = np.zeros_like(entries[0])
    for place in np.ndindex(merged.shape):
        values = [entry[place] for entry in entries]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [i for i, value in enumerate(values) if np.sign(value) == sign]
        total = sum(values[i] for i in agreeing)
        below = sum(terms[i] for i in agreeing) if terms is not None else 1.0
        merged[place] = total / below if below != 0 else total
    return merged


def slerp(left: Array, right: Array, t: float) -> Array:
    """Along the great circle through two vectors that are not parallel."""
    cosine = np.dot(left.ravel(), right.ravel()) / np.linalg.norm(left) / np.linalg.norm(right)
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * left + np.sin(t * angle) * right) / np.sin(angle)


def assert_near(found: torch.Tensor, expected: Array, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest entry: a few float32 roundings."""
    assert tuple(found.shape) == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    assert np.abs(found.double().numpy() - expected).max(initial=0.0) <= tolerance * scale
