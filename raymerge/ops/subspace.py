"""Merge task matrices in the spaces their singular vectors span.

Shapes: E experts, O I the matrix, r = min(O, I). Singular value decompositions run in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and min(tensor.shape) > 0


def orthonormal(vectors: Tensor) -> Tensor:
    """The orthonormal matrix nearest to `vectors` (O, k), by its polar factor."""
    u, _, vh = torch.linalg.svd(vectors, full_matrices=False)
    nearest: Tensor = u @ vh
    return nearest


def isotropic(total: Tensor) -> Tensor:
    """Replace all singular values of (O, I) by their mean."""
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    flattened: Tensor = s.mean() * (u @ vh)
    return flattened


def isotropic_common_and_specific(deltas: Sequence[Tensor], common_fraction: float) -> Tensor:
    """Top singular directions of the sum, filled up with each task's own, all of equal strength (O, I).

    `common_fraction` of the r directions come from the sum, rounded so that the rest divides by E.
    """
    u, s, vh = torch.linalg.svd(sum(deltas[1:], deltas[0]), full_matrices=False)
    rank, count = len(s), len(deltas)
    each = round((rank - int(rank * common_fraction)) / count)
    common = rank - each * count
    if common <= 0:
        each, common = rank // count, rank - rank // count * count
    space = u[:, :common]
    left, right, strength = [space], [vh[:common]], [s[:common]]
    for delta in deltas:
        own_u, own_s, own_vh = torch.linalg.svd(delta - space @ (space.mT @ delta), full_matrices=False)
        left.append(own_u[:, :each])
        right.append(own_vh[:each])
        strength.append(own_s[:each])
    merged_u = orthonormal(torch.cat(left, dim=1))
    merged_v = orthonormal(torch.cat(right, dim=0).mT)
    return torch.cat(strength).mean() * (merged_u @ merged_v.mT)


def decorrelated_sum(deltas: Sequence[Tensor]) -> Tensor:
    """Sum of task matrices cut to rank r / E each, their singular vectors made orthogonal to each other (O, I)."""
    rank = max(1, min(deltas[0].shape) // len(deltas))
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = orthonormal(torch.cat([part[0][:, :rank] for part in parts], dim=1))
    s = torch.cat([part[1][:rank] for part in parts])
    v = orthonormal(torch.cat([part[2][:rank] for part in parts], dim=0).mT)
    return (u * s) @ v.mT
