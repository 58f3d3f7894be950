"""Spherical means from Gram matrices have the properties that define them."""

import math

import pytest
import torch
from references import slerp

from raymerge.ops import spherical


def points(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(300, generator=generator)
    return [centre + 0.5 * torch.randn(300, generator=generator) for _ in range(count)]


def test_gram_matrices_add_up() -> None:
    tensors = points(3)
    total = sum(spherical.gram([t[i : i + 70] for t in tensors]) for i in range(0, 300, 70))
    expected = torch.stack(tensors).double() @ torch.stack(tensors).double().T
    assert total.dtype == torch.float64
    assert torch.allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp(t: float) -> None:
    left, right = points(2)
    found = spherical.slerp_coefficients(spherical.gram([left, right]), t, 0.9995)
    mixed = found[0] * left.double() + found[1] * right.double()
    expected = torch.from_numpy(slerp(left.double().numpy(), right.double().numpy(), t))
    assert torch.allclose(mixed, expected, atol=1e-6)
    rows = spherical.slerp_rows(left[None], right[None], t)
    assert torch.allclose(rows[0].double(), expected, atol=1e-5)


def test_parallel_vectors_are_mixed_linearly() -> None:
    left = points(1)[0]
    for right in (left, 2 * left, -left):
        assert spherical.slerp_coefficients(spherical.gram([left, right]), 0.3, 0.9995) == (0.7, 0.3)
    rows = spherical.slerp_rows(torch.stack([left, left]), torch.stack([3 * left, -left]), 0.25)
    assert torch.allclose(rows, torch.stack([1.5 * left, 0.5 * left]), atol=1e-5)


def test_a_vector_of_zeros_counts_as_perpendicular() -> None:
    found = spherical.slerp_coefficients(torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), 0.5, 0.9995)
    assert found == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))


def test_the_karcher_mean_is_where_the_tangents_cancel() -> None:
    tensors = points(4)
    coefficients = spherical.karcher_coefficients(spherical.gram(tensors), 200, 1e-12)
    mean = sum(c * t.double() for c, t in zip(coefficients, tensors, strict=True))
    norms = [float(t.double().norm()) for t in tensors]
    assert float(mean.norm()) == pytest.approx(sum(norms) / 4, rel=1e-7)
    unit = mean / mean.norm()
    pulled = torch.zeros(300, dtype=torch.float64)
    for tensor in tensors:
        other = tensor.double() / tensor.double().norm()
        angle = math.acos(float(unit @ other))
        pulled += angle / math.sin(angle) * (other - math.cos(angle) * unit)
    assert float(pulled.norm()) < 1e-5


def test_the_karcher_mean_of_two_is_half_way() -> None:
    left, right = (t / t.norm() for t in points(2))
    coefficients = spherical.karcher_coefficients(spherical.gram([left, right]), 100, 1e-12)
    expected = spherical.slerp_coefficients(spherical.gram([left, right]), 0.5, 0.9995)
    assert coefficients == pytest.approx(expected, rel=1e-6)


def test_tensors_without_a_direction() -> None:
    assert spherical.karcher_coefficients(torch.zeros(3, 3).double(), 10, 1e-5) == [0.0, 0.0, 0.0]
    one = spherical.karcher_coefficients(torch.diag(torch.tensor([4.0, 0.0]).double()), 10, 1e-5)
    assert one == pytest.approx([0.5, 0.0])  # direction of the first, mean length (2 + 0) / 2


def test_the_normalized_mean() -> None:
    tensors = points(3)
    shares = [0.5, 0.3, 0.2]
    found = spherical.normalized_mean_coefficients(spherical.gram(tensors), shares, 1e-8)
    units = [t.double() / t.double().norm() for t in tensors]
    direction = sum(s * u for s, u in zip(shares, units, strict=True))
    length = sum(s * float(t.double().norm()) for s, t in zip(shares, tensors, strict=True))
    expected = direction / direction.norm() * length
    assert torch.allclose(sum(c * t.double() for c, t in zip(found, tensors, strict=True)), expected, atol=1e-6)


def test_tensors_that_cancel() -> None:
    two = spherical.gram([torch.ones(3), -torch.ones(3)])
    assert spherical.normalized_mean_coefficients(two, [0.5, 0.5], 1e-8) == [0.5, 0.5]
    corners = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(ValueError, match="cancel"):
        spherical.normalized_mean_coefficients(spherical.gram(corners), [1 / 3] * 3, 1e-6)
