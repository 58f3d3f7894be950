"""Sums of task vectors, plain and by elected sign."""

import pytest
import torch
from references import elect_and_merge

from raymerge.ops import consensus


def vectors(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    found = torch.randn(count, 400, generator=generator)
    # Zeros, and votes that end in a tie.
    found[:, :50] = 0
    found[0, 50:100] = 1
    found[1, 50:100] = -1
    found[2:, 50:100] = 0
    return list(found.to(dtype))


@pytest.mark.parametrize("divisor", ["none", "count", "coefficient"])
@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.0), (0.3, 0.5, 0.2), (1.0, -0.5, 0.0)])
def test_entries_that_agree(divisor: consensus.Divisor, coefficients: tuple[float, ...]) -> None:
    given = vectors(3)
    terms = consensus.divisor_terms(divisor, coefficients)
    found = consensus.agreeing_sum(given, coefficients, terms)
    entries = [c * v.double().numpy() for c, v in zip(coefficients, given, strict=True)]
    expected = torch.from_numpy(elect_and_merge(entries, None if terms is None else list(terms)))
    # A vote within a rounding of zero may be elected either way.
    clear = torch.from_numpy(sum(entries)).abs() > 1e-6
    clear |= torch.from_numpy(sum(entries)) == 0
    assert clear.float().mean() > 0.95
    assert torch.allclose(found.double()[clear], expected[clear], atol=1e-6)


def test_sums_are_rounded_once() -> None:
    """In bfloat16, 256 + 1 is 256: 256 times. In float32, rounded once, it is 512."""
    ones = [torch.full((3,), 256.0, dtype=torch.bfloat16)] + [torch.ones(3, dtype=torch.bfloat16)] * 256
    assert consensus.accumulate(ones).tolist() == [512.0] * 3
    assert consensus.plain_sum(ones, [1.0] * 257, None).tolist() == [512.0] * 3


def test_a_divisor_of_zero_divides_nothing() -> None:
    given = vectors(2)
    found = consensus.plain_sum(given, [0.5, -0.5], [0.5, -0.5])
    assert torch.equal(found, 0.5 * given[0] - 0.5 * given[1])


def test_coefficients_are_rounded_to_the_dtype() -> None:
    assert consensus.rounded(0.1, torch.bfloat16) == float(torch.tensor(0.1).bfloat16())
    assert consensus.weighted([torch.ones(1).bfloat16()], [0.1])[0].item() == consensus.rounded(0.1, torch.bfloat16)


def test_inputs_are_not_touched() -> None:
    given = vectors(3)
    before = [vector.clone() for vector in given]
    consensus.agreeing_sum(given, [1.0, 1.0, 1.0], None)
    consensus.plain_sum(given, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
