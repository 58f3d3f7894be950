"""Interpolation on a sphere, from inner products alone.

Every spherical mean of x_1 ... x_E lies in their span, so it is `sum_i c_i x_i` with coefficients
that follow from the Gram matrix `G_ij = <x_i, x_j>`. A Gram matrix adds up over chunks, so tensors
of any size are merged in two streamed passes.

Shapes: E experts; G is float64 (E, E).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """Inner products of one chunk, float64 (E, E): float32 dot products, added up in float64."""
    flat = [tensor.flatten().to(torch.float32) for tensor in tensors]
    found = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for i, left in enumerate(flat):
        for j, right in enumerate(flat[: i + 1]):
            found[i, j] = found[j, i] = float(torch.dot(left, right))
    return found


def combine(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """`sum_i c_i x_i` in float32, rounded once to the tensors' dtype."""
    total = tensors[0].to(torch.float32, copy=True).mul_(coefficients[0])
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor, alpha=coefficient)
    return total.to(tensors[0].dtype)


def slerp_coefficients(products: Tensor, t: float, parallel: float) -> tuple[float, float]:
    """Coefficients of spherical interpolation between two tensors, from their Gram matrix (2, 2).

    Linear where the cosine of the angle is at least `parallel` in absolute value. A tensor of zeros has no
    direction and counts as perpendicular, as in mergekit.
    """
    norms = products.diagonal().sqrt().tolist()
    known = min(norms) > 1e-8
    cosine = max(-1.0, min(1.0, float(products[0, 1]) / (norms[0] * norms[1]))) if known else 0.0
    if abs(cosine) >= parallel:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp_rows(left: Tensor, right: Tensor, t: float) -> Tensor:
    """Spherical interpolation of each row (last dimension), linear where rows are parallel; float32."""
    left, right = left.to(torch.float32), right.to(torch.float32)
    unit_left = left / left.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    unit_right = right / right.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    cosine = (unit_left * unit_right).sum(dim=-1, keepdim=True).clamp(-1, 1)
    parallel = 1 - cosine.square() <= 1e-16
    angle = torch.acos(torch.where(parallel, 0, cosine))
    curved = (torch.sin((1 - t) * angle) * left + torch.sin(t * angle) * right) / torch.sin(angle)
    return torch.where(parallel, (1 - t) * left + t * right, curved)


def normalized_mean_coefficients(products: Tensor, shares: Sequence[float], eps: float) -> list[float]:
    """Coefficients of `normalise(sum_i s_i u_i) * sum_i s_i |x_i|`, u_i the unit tensors.

    Two tensors that cancel are averaged linearly; raises ValueError if more than two cancel.
    """
    norms = products.diagonal().sqrt()
    weight = torch.tensor(shares, dtype=torch.float64)
    per_unit = weight / (norms + eps)
    length = float((per_unit @ products @ per_unit).clamp(min=0).sqrt())
    if length < eps:
        # Task vectors that are all zero (a frozen layer) have a mean: zero.
        if len(shares) == 2 or not bool(norms.any()):
            return list(shares)
        raise ValueError("the weighted unit tensors cancel; give other coefficients")
    return [float(c) for c in per_unit / length * (weight * norms).sum()]


def karcher_coefficients(products: Tensor, max_iter: int, tol: float) -> list[float]:
    """Coefficients of the equally weighted Karcher (Riemannian) mean of the unit tensors, scaled by
    the mean of the norms. Tensors shorter than `tol` have no direction and count in the scale only.
    """
    norms = products.diagonal().sqrt()
    known = norms > tol
    if not bool(known.any()):
        return [0.0] * len(norms)
    inverse = torch.where(known, 1 / norms.clamp(min=tol), 0)
    cosines = products * inverse[:, None] * inverse[None, :]
    share = known.to(torch.float64) / known.sum()

    def length(c: Tensor) -> float:
        return float((c @ cosines @ c).clamp(min=0).sqrt())

    mean = share if length(share) >= tol else torch.nn.functional.one_hot(known.int().argmax(), len(norms)).double()
    mean = mean / length(mean)
    for _ in range(max_iter):
        cosine = (cosines @ mean).clamp(-1, 1)
        angle = torch.acos(cosine)
        moving = (angle >= tol) & known
        pull = torch.where(moving, share * angle / torch.sin(angle).clamp(min=1e-300), 0)
        tangent = pull - (pull * cosine).sum() * mean
        size = length(tangent)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        mean = mean / length(mean)
    return [float(c) for c in mean * inverse * norms.mean()]
