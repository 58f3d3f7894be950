"""How far task vectors agree, block by block: directions (cosines) and signs, of every pair of experts.

Shapes: E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raymerge.checkpoint.reader import open_reader
from raymerge.models.blocks import block_name
from raymerge.plan.execute import CHUNK, read_source
from raymerge.plan.schema import Plan


@dataclass(slots=True)
class Agreement:
    """Sums over the entries of some tensors: products (E, E) of task vectors, and pairs of equal sign (E, E)."""

    products: Tensor
    equal_signs: Tensor
    count: int = 0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.products + other.products, self.equal_signs + other.equal_signs, self.count + other.count)

    def cosines(self) -> Tensor:
        """Cosine of every pair of task vectors, (E, E)."""
        norms = self.products.diagonal().sqrt().clamp_min(1e-30)
        return self.products / norms / norms[:, None]

    def signs(self) -> Tensor:
        """Share of entries in which a pair has the same sign, (E, E)."""
        return self.equal_signs / max(1, self.count)


def place_of(name: str) -> str:
    """The block a tensor lies in, as reports call it."""
    block = block_name(name)
    return "outside" if block is None else f"{block.prefix}.{block.index}"


def measure_agreement(plan: Plan) -> Mapping[str, Agreement]:
    """The agreement of all experts' task vectors in each block, in order; reads every checkpoint once.

    Tensors that an expert does not have are left out. Raises StorageError.
    """
    num_experts = sum(model.name != "base" for model in plan.models)
    found: dict[str, Agreement] = {}
    with open_reader(plan.locations) as reader:
        for shard in plan.shards:
            for tensor in shard.tensors:
                if tensor.call is None or tensor.base is None or len(tensor.experts) != num_experts:
                    continue
                zeros = torch.zeros(num_experts, num_experts, dtype=torch.float64)
                total = found.setdefault(place_of(tensor.name), Agreement(zeros, zeros.clone()))
                for first in range(0, tensor.num_elements, CHUNK):
                    count = min(CHUNK, tensor.num_elements - first)
                    parts = [read_source(reader, source, first, count).float() for source in tensor.sources]
                    deltas = torch.stack([part - parts[0] for part in parts[1:]])
                    signs = deltas.sign()
                    total.products += (deltas @ deltas.T).double()
                    # Equal signs add 1, opposite ones -1, and two zeros are equal too.
                    same = (signs @ signs.T).double() + 2 * ((1 - signs.abs()) @ (1 - signs.abs()).T).double()
                    moved = (signs.abs() @ signs.abs().T).double()
                    total.equal_signs += (same + moved) / 2
                    total.count += count
    return found
