"""What is compared where a method draws at random: statistics of the merged task vectors over many seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

NUM_SEEDS = 12


def _recipe(method: str, experts: int, model: dict[str, float], **parameters: object) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "wide",
        "models": [{"model": f"wide-expert-{i}", "parameters": dict(model)} for i in range(1, experts + 1)],
        "parameters": parameters,
        "dtype": "float32",
    }


SPARSE = {"weight": 0.5, "density": 0.3}
RANKED = {"weight": 0.5, "density": 0.4, "epsilon": 0.25}
# With one expert the mask itself is seen; with three, consensus and sums.
RANDOM_RECIPES = {
    "dare_linear": _recipe("dare_linear", 1, SPARSE),
    "dare_linear_plain": _recipe("dare_linear", 3, SPARSE, rescale=False, normalize=True),
    "dare_ties": _recipe("dare_ties", 3, SPARSE),
    "dare_ties_normalize": _recipe("dare_ties", 3, SPARSE, normalize=True, **{"lambda": 0.7}),
    "della_linear": _recipe("della_linear", 1, RANKED),
    "della": _recipe("della", 3, RANKED),
    "della_plain": _recipe("della", 3, RANKED, rescale=False, normalize=False),
}


def describe(merged: Mapping[str, Tensor], folder: Path) -> dict[str, float]:
    """Statistics of `merged - base`, beside the mean task vector of the experts, over all matrices."""
    base = load_file(folder / "wide" / "model.safetensors")
    experts = [load_file(folder / f"wide-expert-{i}" / "model.safetensors") for i in (1, 2, 3)]
    kept, norm_ratios, ours, means, first = [], [], [], [], []
    for name, origin in base.items():
        if origin.dim() < 2:
            continue
        found = merged[name].double() - origin.double()
        deltas = torch.stack([expert[name].double() - origin.double() for expert in experts])
        # Rank of each entry of the first task vector in its row, from 0 to 1.
        rank = deltas[0].abs().argsort(-1).argsort(-1) / (origin.shape[1] - 1)
        kept.append(torch.stack([found != 0, rank], -1).flatten(0, -2))
        norm_ratios.append(float(found.abs().sum() / deltas[0].abs().sum()))
        ours.append(found.flatten())
        means.append(deltas.mean(0).flatten())
        first.append(deltas[0].flatten())
    marks, change, mean, delta = torch.cat(kept), torch.cat(ours), torch.cat(means), torch.cat(first)
    return {
        "kept": float(marks[:, 0].mean()),
        "kept_of_smallest_quarter": float(marks[marks[:, 1] < 0.25, 0].mean()),
        "kept_of_largest_quarter": float(marks[marks[:, 1] > 0.75, 0].mean()),
        "smallest_l1_ratio": min(norm_ratios),
        "largest_l1_ratio": max(norm_ratios),
        "l1": float(change.abs().mean()),
        "l2": float(change.square().mean().sqrt()),
        "along_mean": float((change * mean).sum() / mean.square().sum()),
        "along_first": float((change * delta).sum() / delta.square().sum()),
        "largest": float(change.abs().max()),
    }
