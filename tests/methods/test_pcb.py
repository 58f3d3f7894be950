"""PCB-Merging against the published formula on the flattened model."""

import numpy as np
import pytest
import torch
from references import deltas, doubles, family

from raymerge.methods.base import merge_whole
from raymerge.methods.pcb import Pcb


def reference(found: list[np.ndarray], ratio: float) -> np.ndarray:
    flat = np.stack([d.ravel() for d in found])
    count, size = flat.shape
    ordered = np.sort(np.abs(flat), axis=1)
    low, high = ordered[:, [int(size * 1e-4)]], ordered[:, [int(size * (1 - 1e-4) - 1)]]
    clamped = np.clip(np.abs(flat), low, high)
    within = np.exp(count * ((clamped - low) / (high - low)) ** 2)
    between = np.tanh(flat * flat.sum(axis=0))
    scores = within * between
    ranked = np.sort(scores, axis=1)
    lose, best = ranked[:, [int(size * (1 - ratio))]], ranked[:, [size - 1]]
    share = (np.clip(scores, lose, best) - lose) / (best - lose)
    merged = (np.sign(flat) * clamped * share).sum(0) / np.maximum(share.sum(0), 1e-12)
    return merged.reshape(found[0].shape)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("chunk", [None, 256])
def test_reference(ratio, chunk):
    base, experts = family((60, 50), 3)
    merged = merge_whole(Pcb(coefficient=1.2, ratio=ratio), base, experts, chunk=chunk)
    expected = doubles(base)[0] + 1.2 * reference(deltas(base, experts), ratio)
    # Scores within float32 of the threshold have a share near zero, where the quotient of two shares is
    # not determined: at most a few entries may differ.
    far = np.abs(merged.double().numpy() - expected) > 1e-4
    assert far.mean() < 2e-3


def test_worked_example():
    base = torch.zeros(4)
    experts = [torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([1.0, 2.0, 0.0, -1.0])]
    # Of four entries, the second largest magnitude, 1, clamps the largest; all then agree on 1, 1, 0, -1.
    assert merge_whole(Pcb(coefficient=1.0, ratio=1.0), base, experts).tolist() == [1.0, 1.0, 0.0, -1.0]
