"""Merging in the spaces of singular vectors."""

import torch

from raymerge.ops import subspace


def matrices(count: int, shape: tuple[int, int] = (12, 20)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_all_singular_values_become_their_mean() -> None:
    (matrix,) = matrices(1)
    found = torch.linalg.svdvals(subspace.isotropic(matrix))
    assert torch.allclose(found, torch.linalg.svdvals(matrix).mean().expand(12), atol=1e-5)


def test_the_nearest_orthonormal_matrix() -> None:
    vectors = matrices(1, (20, 6))[0]
    found = subspace.orthonormal(vectors)
    assert torch.allclose(found.T @ found, torch.eye(6), atol=1e-5)
    assert torch.allclose(subspace.orthonormal(found), found, atol=1e-5)


def test_common_and_specific_directions() -> None:
    deltas = matrices(3)
    found = subspace.isotropic_common_and_specific(deltas, 0.5)
    values = torch.linalg.svdvals(found)
    assert torch.allclose(values, values[0].expand(12), atol=1e-4)
    whole = subspace.isotropic_common_and_specific(deltas, 1.0)
    assert torch.allclose(whole, subspace.isotropic(sum(deltas)), atol=1e-4)


def test_one_task_vector_is_its_own_decorrelated_sum() -> None:
    (delta,) = matrices(1)
    assert torch.allclose(subspace.decorrelated_sum([delta]), delta, atol=1e-4)


def test_task_vectors_in_other_directions_add_up() -> None:
    """Of rank r / E each, and orthogonal: nothing is lost, nothing interferes."""
    u, v = torch.linalg.qr(matrices(1, (12, 12))[0])[0], torch.linalg.qr(matrices(1, (20, 12))[0])[0]
    deltas = [u[:, i : i + 4] @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])) @ v[:, i : i + 4].T for i in (0, 4, 8)]
    assert torch.allclose(subspace.decorrelated_sum(deltas), sum(deltas), atol=1e-4)
