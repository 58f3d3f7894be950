"""What of a plan is learned: units and their files, samples, and what fitting a unit takes in a worker.

Sizes come from the model's skeleton, so a model's `config.json` is enough to say whether it fits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from raymerge.distill.schedule import TAIL, WHOLE
from raymerge.errors import MemoryBudgetError, RecipeError
from raymerge.learn.calibration import find_calibration
from raymerge.methods.base import is_per_expert, setting_fields
from raymerge.methods.prodistill import Prodistill
from raymerge.models.trunk import Trunk
from raymerge.plan import memory
from raymerge.plan.schema import Call, Distillation, PlannedTensor, Unit, UnitCost
from raymerge.recipe.schema import Compute, Recipe


class LearningPlanner:
    """The units of one recipe, while its plan is made."""

    def __init__(
        self, recipe: Recipe, config: Mapping[str, Any], tensors: Sequence[PlannedTensor], calls: Sequence[Call]
    ) -> None:
        self._recipe = recipe
        self.method = _one_method(calls)
        if recipe.slices is not None:
            raise RecipeError("slices: prodistill fits whole models; leave slices out")
        self.trunk = Trunk(config, self.method.blocks or None)
        whole = self.method.schedule == "whole"
        _check_compute(recipe.compute, 1 if whole else sum(stack.num_blocks for stack in self.trunk.stacks))
        self._sizes = _unit_parameters(self.trunk, self.method)
        owner = {parameter: unit for unit, sizes in self._sizes.items() for parameter in sizes}
        self._unit_of = {}
        for tensor in tensors:
            parameter, _ = self.trunk.conversion.parameter_of(tensor.name)
            if tensor.call is not None and parameter in owner:
                self._unit_of[tensor.name] = owner[parameter]
        empty = [unit for unit in self._sizes if unit not in self._unit_of.values()]
        if set(empty) - {TAIL}:
            raise RecipeError(f"settings.blocks: no tensor of the checkpoints lies in {empty[0]}")

    def groups(self, tensors: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
        """Tensors that share files: what is not learned first, then each unit's."""
        found: dict[str | None, list[PlannedTensor]] = {None: []} | {unit: [] for unit in self._sizes}
        for tensor in tensors:
            found[self._unit_of.get(tensor.name)].append(tensor)
        return [group for group in found.values() if group]

    def finish(self, files: Sequence[Sequence[PlannedTensor]], weightless: bool) -> Distillation:
        """The learned part of the plan, once files are known; `weightless` plans can do without samples.

        Raises RecipeError if an expert's samples are missing or cannot be read.
        """
        experts = self._recipe.experts
        for name, expert in experts.items():
            if expert.calibration is None and not weightless:
                raise RecipeError(
                    f"experts.{name}.calibration: {self._recipe.method} learns from a few dozen unlabelled rows of "
                    f"each expert; name a parquet or jsonl file, or a folder of them"
                )
        units = []
        for unit, sizes in self._sizes.items():
            shards = tuple(n for n, tensors in enumerate(files) if self._unit_of.get(tensors[0].name) == unit)
            if shards:
                units.append(Unit(name=unit, shards=shards, num_parameters=sum(sizes.values())))
        return Distillation(
            units=tuple(units),
            blocks=self.method.blocks,
            calibrations=tuple(
                find_calibration(name, expert.calibration) for name, expert in experts.items() if expert.calibration
            ),
            keep_moved=self._recipe.output.coefficients,
            precision=self._recipe.compute.precision,
        )

    def costs(self, budget: int | None) -> tuple[UnitCost, ...]:
        """What each unit takes in a worker. Raises MemoryBudgetError if one does not fit the budget, in bytes."""
        config = self.trunk.model.config
        width: int = getattr(config, "hidden_size", None) or config.get_text_config().hidden_size
        tokens, num_experts = _tokens(config, self.method), len(self._recipe.experts)
        baseline = memory.baseline_of_learning()
        costs = []
        for unit, sizes in self._sizes.items():
            cost = unit_cost(unit, sum(sizes.values()), num_experts, self.method, self._recipe.compute, width, tokens)
            if budget is not None and baseline + cost.total_bytes > budget:
                raise MemoryBudgetError(
                    f"{unit}: fitting {cost.num_parameters / 1e6:.0f} M parameters takes "
                    f"{(baseline + cost.total_bytes) / 1e9:.2f} GB per worker, {budget / 1e9:.2f} GB are allowed: "
                    f"raise the memory, or use more workers with compute.zero_stage: 3"
                )
            costs.append(cost)
        return tuple(costs)


def unit_cost(
    name: str, num_parameters: int, num_experts: int, method: Prodistill, compute: Compute, width: int, tokens: int
) -> UnitCost:
    """What fitting a unit takes; `width` of the hidden states, `tokens` positions of a sample."""
    # Of one stage: its workers share what is learned.
    workers, stage = (compute.workers or 1) // compute.stages, compute.zero_stage
    element = method.granularity == "element"
    # Other granularities train a few numbers and hold all task vectors.
    trained = num_parameters if element else num_experts
    numbers = 4 * trained // (workers if stage >= 3 else 1)
    gradients = 4 * trained // (workers if stage >= 2 else 1)
    moments = 0 if compute.offload and compute.gpus_per_worker else 8 * trained // (workers if stage >= 1 else 1)
    computed = 4 if compute.precision == "float32" else 2
    rows, samples = -(-method.batch_size // workers), num_experts * method.samples // workers
    return UnitCost(
        name=name,
        num_parameters=num_parameters,
        state_bytes=numbers + gradients + moments,
        frozen_bytes=4 * num_parameters * (2 if element else 1 + num_experts),
        step_bytes=2 * computed * num_parameters + 16 * rows * tokens * width * computed,
        cache_bytes=2 * samples * tokens * width * computed,
    )


def _check_compute(compute: Compute, num_blocks: int) -> None:
    if compute.offload and not compute.zero_stage:
        raise RecipeError("compute.offload: DeepSpeed offloads what it shards; set compute.zero_stage to 1, 2 or 3")
    if compute.stages > num_blocks:
        raise RecipeError(f"compute.stages: found {compute.stages}; there are {num_blocks} blocks to share out")
    if (compute.workers or 1) % compute.stages:
        raise RecipeError(
            f"compute.stages: found {compute.stages}, which does not divide compute.workers: {compute.workers or 1}; "
            f"every stage gets the same number of workers"
        )


def _unit_parameters(trunk: Trunk, method: Prodistill) -> dict[str, dict[str, int]]:
    """Elements of each parameter of each unit, in the order they are fitted."""
    found: dict[str, dict[str, int]] = {}
    for stack in trunk.stacks:
        for block in range(stack.num_blocks):
            prefix = stack.parameter_prefix(block)
            parameters = trunk.parameters_of(stack, block)
            found[f"{stack.name}.{block}"] = {f"{prefix}{name}": value.numel() for name, value in parameters.items()}
    if method.fit_tail:
        found[TAIL] = {name: trunk.outside[name].numel() for name in trunk.tail}
    if method.schedule == "whole":
        return {WHOLE: {name: size for sizes in found.values() for name, size in sizes.items()}}
    return found


def _tokens(config: Any, method: Prodistill) -> int:
    """Positions of a sample: a text's at most, an image's patches."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else method.max_length


def _one_method(calls: Sequence[Call]) -> Prodistill:
    """The method of all calls, which may differ in what is set per expert only. Raises RecipeError."""
    shared = [name for name, setting in setting_fields(Prodistill).items() if not is_per_expert(setting)]
    for name in shared:
        values = list(dict.fromkeys(call.settings[name] for call in calls))
        if len(values) > 1:
            raise RecipeError(f"settings.{name}: found {values[0]!r} and {values[1]!r}; it is one for all tensors")
    built = calls[0].build()
    assert isinstance(built, Prodistill)
    return built
