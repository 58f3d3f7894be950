"""What a report shows of weights: learned coefficients, and how far task vectors agree."""

import operator
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from safetensors import safe_open

from raymerge.checkpoint.model_folder import RECIPE
from raymerge.errors import RayMergeError
from raymerge.models.blocks import natural_order
from raymerge.plan.build import build_plan
from raymerge.recipe.load import load_recipe
from raymerge.report import plots
from raymerge.report.agreement import measure_agreement, place_of
from raymerge.report.section import Section


def coefficients_sections(merged: Path) -> Iterator[Section]:
    """Learned coefficients of every expert by block, where they were written."""
    path = merged / "raymerge" / "coefficients.safetensors"
    if not path.is_file():
        return
    edges = torch.linspace(-1.0, 2.0, 61)
    sums: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, torch.Tensor] = {}
    with safe_open(str(path), framework="pt") as tensors:
        named = sorted(load_recipe(merged / RECIPE).experts, key=len, reverse=True)
        for key in sorted(tensors.keys(), key=natural_order):
            # Names of experts may have dots in them.
            expert = next(one for one in named if key.startswith(f"{one}."))
            name = key.removeprefix(f"{expert}.")
            value = tensors.get_tensor(key).flatten().float()
            entry = sums.setdefault(place_of(name), {}).setdefault(expert, [0.0, 0.0])
            entry[0] += float(value.sum())
            entry[1] += len(value)
            found = torch.histc(value.clamp(edges[0], edges[-1]), bins=60, min=float(edges[0]), max=float(edges[-1]))
            counts[expert] = counts.get(expert, torch.zeros(60)) + found
    experts = list(counts)
    values = [[entry[expert][0] / entry[expert][1] for expert in experts] for entry in sums.values()]
    shares = {expert: (found / found.sum()).tolist() for expert, found in counts.items()}
    yield Section(
        name="coefficients",
        title="Coefficients",
        pictures=[
            plots.heat_map("coefficients", "Mean coefficient by block and expert", list(sums), experts, values),
            plots.histogram("coefficients-histogram", "All learned coefficients by expert", edges.tolist(), shares),
        ],
    )


def task_vectors_sections(merged: Path) -> Iterator[Section]:
    """How far task vectors agree by block, where the checkpoints are still there."""
    recipe = load_recipe(merged / RECIPE)
    try:
        plan = build_plan(recipe)
        found = measure_agreement(plan)
    except RayMergeError as problem:
        yield Section(name="task-vectors", title="Task vectors", text=[f"Not measured: {problem}"])
        return
    experts = [model.name for model in plan.models if model.name != "base"]
    if not found or len(experts) < 2:
        return
    upper = torch.triu_indices(len(experts), len(experts), offset=1)
    signs = [float(one.signs()[upper[0], upper[1]].mean()) for one in found.values()]
    cosines = [float(one.cosines()[upper[0], upper[1]].mean()) for one in found.values()]
    whole = reduce(operator.add, found.values()).cosines().tolist()
    yield Section(
        name="task-vectors",
        title="Task vectors",
        text=["How far the experts moved the same way: 0.5 of equal signs and a cosine of 0 are no more than chance."],
        pictures=[
            plots.profiles(
                "agreement",
                "Agreement of task vectors by block, mean over pairs of experts",
                list(found),
                {"share of equal signs": signs, "cosine": cosines},
            ),
            plots.heat_map("cosines", "Cosine of every pair of task vectors", experts, experts, whole, -1.0, 1.0),
        ],
    )
