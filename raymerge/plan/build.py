"""From a recipe to a plan: read headers, match tensors, resolve every setting, find every mismatch.

Nothing is written, and no tensor's data is read.
"""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch

import raymerge
from raymerge import methods
from raymerge.checkpoint.header import DTYPES, NAMES, Entry, Headers
from raymerge.checkpoint.index import Checkpoint, open_checkpoint
from raymerge.checkpoint.model_folder import HEADS
from raymerge.checkpoint.reader import StoredTensor
from raymerge.errors import MismatchError, MissingTensor, RecipeError, ShapeMismatch
from raymerge.methods.base import LearnedMethod, StatisticsMethod
from raymerge.models.blocks import block_lists, block_name, natural_order
from raymerge.plan import memory
from raymerge.plan.align import align
from raymerge.plan.distill import LearningPlanner
from raymerge.plan.forecast import num_reads
from raymerge.plan.layout import Place, lay_out, output_config
from raymerge.plan.naming import head_module, match_names, trunk_names
from raymerge.plan.schema import Call, Cost, Model, Plan, PlannedTensor, Shard, Source, Tokenizer, UnitCost
from raymerge.plan.sketch import open_or_sketch
from raymerge.recipe.schema import Filtered, Recipe, Settings
from raymerge.recipe.settings import resolve_settings

SMALLEST_AUTO_SHARD = 64 * 2**20
LARGEST_AUTO_SHARD = 5 * 10**9
AUTO_SHARDS = 32


def build_plan(recipe: Recipe, *, weightless: bool = False) -> Plan:
    """The plan of a recipe. `weightless`: of checkpoints without weights, what their `config.json` says will do.

    Raises UserError of every kind: CheckpointError, MismatchError, RecipeError, MemoryBudgetError.
    """
    # A plan has no cycles, and is large: the collector would walk all of it again and again as it grows.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _Planner(recipe, weightless).plan()
    finally:
        if collects:
            gc.enable()


@dataclass(slots=True)
class _Calls:
    """The distinct calls of a plan, numbered as they are first used."""

    method: str
    found: list[Call] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def number(self, settings: dict[str, Any]) -> int:
        key = repr(settings)
        if key not in self._numbers:
            call = Call(method=self.method, settings=settings)
            call.build().check()
            self._numbers[key] = len(self.found)
            self.found.append(call)
        return self._numbers[key]


class _Planner:
    """One plan while it is made. `frame` is the model whose tensors the output has."""

    def __init__(self, recipe: Recipe, weightless: bool) -> None:
        # Before the plan grows: workers do not hold it.
        self.baseline = memory.baseline_bytes()
        self.recipe = recipe
        self.method = methods.find(recipe.method)
        self.calls = _Calls(recipe.method)
        self.filters = _filters(recipe)
        self.known_calls: dict[tuple[object, ...], int] = {}
        self.notes: list[str] = list(recipe.notes)
        self.checkpoints = _open_all(recipe, open_or_sketch if weightless else open_checkpoint)
        self.notes += [
            f"{name}: no weights there; sizes are from its config.json, and the recipe cannot be merged"
            for name, checkpoint in self.checkpoints.items()
            if checkpoint.is_sketch
        ]
        self.order = list(self.checkpoints)
        self.numbers = {name: number for number, name in enumerate(self.order)}
        self.frame_name = self.order[0]
        self.frame = self.checkpoints[self.frame_name]
        self.lists = block_lists(self.frame.tensors)
        self.names = {name: match_names(self.frame, checkpoint) for name, checkpoint in self.checkpoints.items()}
        self._check_depths()
        self.alignment = align(recipe, self.checkpoints, self.names, self.frame_name)
        self.head_modules = self._find_head_modules()

    def plan(self) -> Plan:
        places = lay_out(self.recipe, self.frame)
        places.sort(key=lambda place: natural_order(place.name))
        tensors = [tensor for place in places for tensor in self._tensor(place)]
        heads = {name: self._head(name) for name in self.recipe.experts}
        heads = {name: head for name, head in heads.items() if head}
        self._check_scopes(tensors)
        asked = self.recipe.compute.memory
        budget = None if asked is None else memory.parse_bytes(asked, "compute.memory")
        reading = memory.reading_bytes(checkpoint.location for checkpoint in self.checkpoints.values())
        fitted, peak = memory.fit(tensors, self.calls.found, budget, self.baseline + reading)
        everything = [*fitted, *(tensor for head in heads.values() for tensor in head)]
        built = [call.build() for call in self.calls.found]
        config = self._config()
        learning: LearningPlanner | None = None
        unit_costs: tuple[UnitCost, ...] = ()
        if issubclass(self.method, LearnedMethod):
            learning = LearningPlanner(self.recipe, config, fitted, self.calls.found)
            unit_costs = learning.costs(budget)
            peak = max(peak, memory.baseline_of_learning() + max(cost.total_bytes for cost in unit_costs))
        files = _pack(learning.groups(fitted) if learning else [fitted], self._shard_size(fitted))
        shards = _named(files)
        shards += [
            Shard(file=f"{HEADS}/{name}/model.safetensors", tensors=_by_alignment(head)) for name, head in heads.items()
        ]
        if heads:
            parts = ", ".join(sorted({head_module(t.name) for head in heads.values() for t in head}))
            self.notes.append(f"kept per expert, not merged: {parts} ({HEADS}/)")
        return Plan(
            version=raymerge.__version__,
            method=self.recipe.method,
            models=tuple(
                Model(name=name, location=checkpoint.location, fingerprint=checkpoint.fingerprint)
                for name, checkpoint in self.checkpoints.items()
            ),
            calls=tuple(self.calls.found),
            shards=tuple(shards),
            seed=self.recipe.seed,
            config=config,
            head_experts=tuple(self.numbers[name] for name in heads),
            tokenizer=self.alignment.tokenizer if self.alignment else Tokenizer(model=0),
            chat_template=self.recipe.output.chat_template,
            notes=tuple(dict.fromkeys(self.notes)),
            cost=Cost(
                bytes_read=sum(
                    memory.held_bytes(t) * num_reads(t, None if t.call is None else built[t.call]) for t in everything
                ),
                bytes_written=sum(_bytes_of(tensor) for tensor in everything),
                peak_bytes_per_worker=peak,
                baseline_bytes=self.baseline,
                units=unit_costs,
                num_learners=(self.recipe.compute.workers or 1) if learning else 0,
                machine_bytes=memory.machine_bytes(),
            ),
            distillation=learning.finish(files, any(c.is_sketch for c in self.checkpoints.values()))
            if learning
            else None,
        )

    # -- what does not fit

    def _check_depths(self) -> None:
        """Extra blocks are not a head: refuse experts with more blocks than the frame."""
        if self.recipe.slices is not None:
            return
        for name, matched in self.names.items():
            for extra in matched.extra:
                block = block_name(extra)
                if block and block.prefix in self.lists:
                    raise MismatchError(
                        f"{extra}: {name!r} has it, {self.frame_name!r} has {self.lists[block.prefix]} blocks under "
                        f"{block.prefix}; experts must have the base's blocks (slices can choose some)"
                    )

    def _find_head_modules(self) -> frozenset[str]:
        """Modules outside the trunk that are kept per expert: asked for, or of different shapes."""
        asked = set(self.recipe.output.heads)
        unknown = asked and asked - {head_module(name) for c in self.checkpoints.values() for name in c.tensors}
        if unknown:
            raise RecipeError(f"output.heads: no model has a module {', '.join(sorted(unknown))}")
        differing = [
            name
            for matched, checkpoint in ((self.names[n], c) for n, c in self.checkpoints.items())
            for name, own in matched.own.items()
            if checkpoint.tensors[own][1].shape != self.frame.tensors[name][1].shape
            and not (self.alignment and name in self.alignment.embeddings)
        ]
        if differing:
            trunk = trunk_names(self.frame)
            for name in differing:
                if name in trunk:
                    shapes = {n: self._entry(n, name) for n in self.order}
                    found = ", ".join(f"{n!r} has {entry.shape}" for n, entry in shapes.items() if entry)
                    raise ShapeMismatch(f"{name}: {found}; they are not fine-tuned from one base")
            asked.update(head_module(name) for name in differing)
        return frozenset(asked)

    def _entry(self, model: str, name: str) -> Entry | None:
        """The entry of a model's tensor by its frame name; None if the model does not have it."""
        own = self.names[model].own.get(name, name)
        found = self.checkpoints[model].tensors.get(own)
        return found[1] if found else None

    # -- tensors

    def _stored(self, model: str, name: str) -> StoredTensor | None:
        own = self.names[model].own.get(name, name)
        found = self.checkpoints[model].tensors.get(own)
        return None if found is None else self._locate(model, *found)

    def _locate(self, model: str, file: str, entry: Entry) -> StoredTensor:
        return StoredTensor(self.numbers[model], file, entry.name, entry.start, entry.dtype, entry.shape)

    def _tensor(self, place: Place) -> list[PlannedTensor]:
        """The planned tensor of a place; none if only the experts' own heads have it."""
        module = head_module(next(iter(place.names.values())))
        stored = {model: self._stored(model, name) for model, name in place.names.items() if model in self.checkpoints}
        if module in self.head_modules:
            return self._base_head(place, stored.get("base"))
        present = {model: tensor for model, tensor in stored.items() if tensor is not None}
        if not present:
            raise MissingTensor(f"{place.name}: none of {', '.join(stored)} has it; check the block ranges")
        first = next(iter(present.values()))
        if not DTYPES[first.dtype].is_floating_point:
            self.notes.append(f"copied from {next(iter(present))!r}, not merged (not floating point): {place.name}")
            return [_copied(place.name, Source(name=next(iter(present)), tensors=(first,)), first)]
        missing = [model for model in stored if model not in present]
        if missing:
            return self._with_missing(place, present, missing)
        return [self._merged(place, present)]

    def _base_head(self, place: Place, base: StoredTensor | None) -> list[PlannedTensor]:
        if base is None:
            return []
        self.notes.append(f"copied from the base: {place.name}")
        return [_copied(place.name, Source(name="base", tensors=(base,)), base, self.recipe.output.dtype)]

    def _with_missing(self, place: Place, present: dict[str, StoredTensor], missing: list[str]) -> list[PlannedTensor]:
        name, policy = place.name, self.recipe.output.missing
        experts = [model for model in present if model != "base"]
        base = present.get("base")
        if base is not None and not experts and name not in trunk_names(self.frame):
            self.notes.append(f"copied from the base, no expert has it: {name}")
            return [_copied(name, Source(name="base", tensors=(base,)), base, self.recipe.output.dtype)]
        if policy == "error":
            raise MissingTensor(
                f"{name}: missing in {', '.join(map(repr, missing))}; set output.missing: base (take the base's) "
                f"or skip (merge without)"
            )
        self.notes.append(f"{name}: missing in {', '.join(missing)}; {policy}")
        if policy == "base":
            if base is None:
                raise MissingTensor(f"{name}: missing in {', '.join(missing)}, and there is no base to take it from")
            return [self._merged(place, {m: present.get(m, base) for m in place.names if m in self.checkpoints})]
        if base is not None and not experts:
            return [_copied(name, Source(name="base", tensors=(base,)), base, self.recipe.output.dtype)]
        return [self._merged(place, present)]

    def _merged(self, place: Place, present: Mapping[str, StoredTensor]) -> PlannedTensor:
        members = tuple(present)
        experts = tuple(name for name in members if name != "base")
        base = "base" if self.method.uses_base and "base" in present else None
        if self.method.needs_base and base is None:
            raise RecipeError(
                f"{place.name}: {self.recipe.method} needs the base here; name it in this slice's sources"
            )
        self._check_count(place.name, len(experts))
        aligned = self._aligned(place, present)
        sources = {name: aligned.get(name) or Source(name=name, tensors=(tensor,)) for name, tensor in present.items()}
        shape = self._shape(place, present)
        used = (*((base,) if base else ()), *experts)
        dtypes = list(dict.fromkeys(DTYPES[present[name].dtype] for name in used))
        if not all(dtype.is_floating_point for dtype in dtypes):
            raise MismatchError(f"{place.name}: integers in one model, floats in another; they are not of one family")
        arithmetic = _arithmetic(self.recipe, dtypes)
        kept = _promoted(dtypes) if self.recipe.arithmetic == "stored" else DTYPES[next(iter(present.values())).dtype]
        return PlannedTensor(
            name=place.name,
            shape=shape,
            dtype=NAMES[getattr(torch, self.recipe.output.dtype) if self.recipe.output.dtype else kept],
            arithmetic=NAMES[arithmetic],
            call=self._call(place, experts),
            base=sources[base] if base else None,
            experts=tuple(sources[name] for name in experts),
        )

    def _call(self, place: Place, experts: tuple[str, ...]) -> int:
        """The number of the call that merges a place: the same for names that no filter tells apart."""
        names = [place.name, *(self._own_name(name, place.names[name]) for name in experts)] if self.filters else []
        matches = tuple(part in name for name in names for part in self.filters)
        key = (experts, place.depth, id(place.own_scopes), matches)
        if key not in self.known_calls:
            self.known_calls[key] = self.calls.number(self._settings(place, experts))
        return self.known_calls[key]

    def _settings(self, place: Place, experts: Sequence[str]) -> dict[str, Any]:
        whole: Settings = self.recipe.settings
        return resolve_settings(
            self.method,
            [*place.scopes, whole],
            [
                (name, [*place.own_scopes.get(name, ()), whole], self._own_name(name, place.names[name]))
                for name in experts
            ],
            place.name,
            place.depth,
            self.recipe.required,
        )

    def _own_name(self, model: str, name: str) -> str:
        return self.names[model].own.get(name, name)

    def _shape(self, place: Place, present: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        name = next(iter(place.names.values()))
        shapes = {tensor.shape for tensor in present.values()}
        if self.alignment and name in self.alignment.embeddings:
            return (self.alignment.num_rows, *next(iter(shapes))[1:])
        if len(shapes) > 1:
            found = ", ".join(f"{model!r} has {tensor.shape}" for model, tensor in present.items())
            raise ShapeMismatch(f"{place.name}: {found}; they are not fine-tuned from one base")
        return shapes.pop()

    def _aligned(self, place: Place, present: Mapping[str, StoredTensor]) -> dict[str, Source]:
        """Sources whose rows are aligned by token; empty for other tensors."""
        name = next(iter(place.names.values()))
        if self.alignment is None or name not in self.alignment.embeddings:
            return {}
        members = tuple(present)
        reference = self.frame_name if self.frame_name in present else members[0]
        runs = self.alignment.rows(members, reference)
        return {model: Source(name=model, tensors=tuple(present.values()), rows=runs[model]) for model in members}

    def _check_count(self, name: str, found: int) -> None:
        least, most = self.method.num_experts
        if found < least or (most is not None and found > most):
            expected = f"{least}" if least == most else f"{least} to {most}" if most else f"at least {least}"
            raise RecipeError(f"{name}: {self.recipe.method} merges {expected} experts; the recipe has {found} here")

    def _head(self, expert: str) -> list[PlannedTensor]:
        """The tensors only this expert can have: what the frame lacks, and modules kept per expert."""
        checkpoint, matched = self.checkpoints[expert], self.names[expert]
        kept = [] if self.recipe.slices is not None else list(matched.extra)
        if self.head_modules:
            kept += [own for name, own in matched.own.items() if head_module(name) in self.head_modules]
        return [
            _copied(own, Source(name=expert, tensors=(stored,)), stored)
            for own in kept
            for stored in [self._locate(expert, *checkpoint.tensors[own])]
        ]

    # -- the whole

    def _check_scopes(self, tensors: Iterable[PlannedTensor]) -> None:
        """Statistics of the whole model need the same settings, experts and arithmetic for every tensor."""
        used = dict.fromkeys((t.call, t.arithmetic, len(t.experts)) for t in tensors if t.call is not None)
        built = [(self.calls.found[call].build(), arithmetic, count) for call, arithmetic, count in used]
        whole = [(m, a, n) for m, a, n in built if isinstance(m, StatisticsMethod) and m.scope == "model"]
        if not whole:
            return
        scoped = dict.fromkeys(
            (*(getattr(method, key) for key in method.scoped_settings), arithmetic, count)
            for method, arithmetic, count in whole
        )
        if len(whole) < len(built) or len(scoped) > 1:
            keys = ", ".join(whole[0][0].scoped_settings)
            raise RecipeError(
                f"settings: {self.recipe.method} ranks entries over the whole model, so {keys}, experts and dtypes "
                f"must be the same for all tensors; use trim_scope: tensor where the method has it"
            )

    def _shard_size(self, tensors: Sequence[PlannedTensor]) -> int:
        asked = self.recipe.output.shard_size
        if asked != "auto":
            return memory.parse_bytes(asked, "output.shard_size")
        total = sum(_bytes_of(tensor) for tensor in tensors)
        return min(max(total // AUTO_SHARDS, SMALLEST_AUTO_SHARD), LARGEST_AUTO_SHARD)

    def _config(self) -> dict[str, Any]:
        config = output_config(self.recipe, self.checkpoints, self.frame)
        if self.alignment:
            config["vocab_size"] = self.alignment.num_rows
            owner = self.checkpoints[self.order[self.alignment.tokenizer.model]].config
            config.update({key: owner[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in owner})
        return config


def _open_all(recipe: Recipe, opener: Callable[[str, Headers], Checkpoint]) -> dict[str, Checkpoint]:
    """The checkpoints by name: the base first, then the experts in their order; one path is opened once."""
    paths = {name: expert.path for name, expert in recipe.experts.items()}
    if recipe.base is not None:
        paths = {"base": recipe.base, **paths}
    distinct = list(dict.fromkeys(paths.values()))
    headers = Headers()
    with ThreadPoolExecutor(4) as pool:
        opened = dict(zip(distinct, pool.map(opener, distinct, repeat(headers)), strict=True))
    return {name: opened[path] for name, path in paths.items()}


def _filters(recipe: Recipe) -> tuple[str, ...]:
    """All filters of a recipe's settings."""
    scopes = [recipe.settings, *(expert.settings for expert in recipe.experts.values())]
    for part in recipe.slices or []:
        scopes += [part.settings, *(source.settings for source in part.sources.values())]
    return tuple(
        choice.filter
        for settings in scopes
        for setting in settings.values()
        for choice in (setting if isinstance(setting, list) else [])
        if isinstance(choice, Filtered) and choice.filter
    )


def _copied(name: str, source: Source, stored: StoredTensor, dtype: str | None = None) -> PlannedTensor:
    floating = DTYPES[stored.dtype].is_floating_point
    written = NAMES[getattr(torch, dtype)] if dtype and floating else stored.dtype
    return PlannedTensor(name=name, shape=stored.shape, dtype=written, arithmetic=stored.dtype, call=None, base=source)


def _arithmetic(recipe: Recipe, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    found: torch.dtype = _promoted(dtypes) if recipe.arithmetic == "stored" else getattr(torch, recipe.arithmetic)
    return torch.float32 if found == torch.float64 else found


def _promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found


def _bytes_of(tensor: PlannedTensor) -> int:
    return tensor.num_elements * DTYPES[tensor.dtype].itemsize


def _pack(groups: Sequence[Sequence[PlannedTensor]], size: int) -> list[list[PlannedTensor]]:
    """Fill files up to `size` bytes, in order; a group begins a file, a larger tensor gets one of its own."""
    files: list[list[PlannedTensor]] = []
    for group in groups:
        filled = size + 1
        for tensor in group:
            if filled + _bytes_of(tensor) > size:
                files.append([])
                filled = 0
            files[-1].append(tensor)
            filled += _bytes_of(tensor)
    return files


def _named(files: Sequence[Sequence[PlannedTensor]]) -> list[Shard]:
    """Files under the names that transformers expects."""
    if len(files) == 1:
        return [Shard(file="model.safetensors", tensors=_by_alignment(files[0]))]
    return [
        Shard(file=f"model-{number:05d}-of-{len(files):05d}.safetensors", tensors=_by_alignment(tensors))
        for number, tensors in enumerate(files, start=1)
    ]


def _by_alignment(tensors: Sequence[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """Wider dtypes first, so that every tensor of a file starts at a multiple of its width."""
    return tuple(sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize))
