"""A model's trunk without weights: run block by block, with whatever each block is called with.

The real forward of the model runs once per batch with its blocks replaced by recorders, which return the hidden
states unchanged and keep the other arguments (masks, position embeddings, ...). So any model of transformers is
right without being known here, also where masks differ from block to block. Weights are given with each call.

Shapes: B rows, T tokens, D width.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raymerge.errors import CheckpointError
from raymerge.models.conversion import Conversion
from raymerge.models.quiet import quiet
from raymerge.models.stacks import Stack, find_stacks

HIDDEN = "hidden_states"


@dataclass(frozen=True, slots=True)
class Handed:
    """Stands in a recorded call for the output number `output` that the block before hands on."""

    output: int


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with beside the hidden states; `by_name`: those are a keyword argument."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    by_name: bool


@dataclass(frozen=True, slots=True)
class Flow:
    """What runs from block to block: hidden states (B, T, D), and what else blocks hand on (T5's position bias)."""

    hidden: Tensor
    handed: tuple[Any, ...] = ()


class _Reached(Exception):
    """The last block that was wanted has been called."""


class _Recorder(nn.Module):
    """Stands where a block was: has its attributes, keeps its calls."""

    def __init__(self, block: nn.Module, stack: Stack, index: int, tape: "_Tape") -> None:
        super().__init__()
        # In tuples, so that they are no modules of this one.
        self._held = (block, tape)
        self._place = (stack, index)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_held")[0], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        block, tape = self._held
        if tape.weights is not None:
            return functional_call(block, block_parameters(*self._place, tape.weights), arguments, keywords)
        return tape.called(*self._place, arguments, keywords)


class _Tape:
    """What the recorders of a trunk do during one forward: `wanted` is recorded, stacks in `done` return their end.

    With `weights`, by their names in the trunk, the blocks themselves run.
    """

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] | None = None
        self.wanted: Stack | None = None
        self.done: Mapping[str, Tensor] = {}
        self.num_handed: Mapping[str, int] = {}
        self.first: Tensor | None = None
        self.calls: list[Call] = []
        self._tokens: tuple[Tensor, ...] = ()

    def called(self, stack: Stack, index: int, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        by_name = not arguments
        hidden = keywords[HIDDEN] if by_name else arguments[0]
        count = self.num_handed.get(stack.name, 0)
        if stack.name in self.done:
            last = index == stack.num_blocks - 1
            return self._output(self.done[stack.name] if last else hidden, (None,) * count)
        if stack != self.wanted:
            return self._output(hidden, (None,) * count)
        if index == 0:
            self.first = hidden
            self._tokens = tuple(torch.empty(0) for _ in range(count))
        self.calls.append(
            Call(
                tuple(self._marked(value) for value in arguments[1:]),
                {name: self._marked(value) for name, value in keywords.items() if name != HIDDEN or not by_name},
                by_name,
            )
        )
        # What blocks hand on is known once the first has run.
        if index == stack.num_blocks - 1 or stack.name not in self.num_handed:
            raise _Reached
        return self._output(hidden, self._tokens)

    @staticmethod
    def _output(hidden: Tensor, handed: tuple[Any, ...]) -> Any:
        return (hidden, *handed) if handed else hidden

    def _marked(self, value: Any) -> Any:
        return next((Handed(i) for i, token in enumerate(self._tokens) if value is token), value)


class Trunk:
    """The trunk that `config` describes, on the meta device but for its buffers, which are on `device`.

    Raises CheckpointError if transformers does not know it, RecipeError if its blocks are not clear.
    """

    def __init__(self, config: Mapping[str, Any], blocks: str | None = None, device: str = "cpu") -> None:
        self.device = device
        self.model = _build(config)
        self.conversion = Conversion(self.model)
        self.stacks = find_stacks(self.model, blocks)
        self._tape = _Tape()
        self._blocks: dict[str, list[nn.Module]] = {}
        # What the blocks of a stack hand on beside the hidden states, noted by whoever has run its first one.
        self.num_handed: dict[str, int] = {}
        _fill_buffers(self.model, device)
        for stack in self.stacks:
            listed = self.model.get_submodule(stack.name)
            assert isinstance(listed, nn.ModuleList)
            self._blocks[stack.name] = list(listed)
            for index, block in enumerate(self._blocks[stack.name]):
                listed[index] = _Recorder(block, stack, index, self._tape)

    def parameters_of(self, stack: Stack, block: int) -> dict[str, nn.Parameter]:
        """A block's parameters without values, by their names within the block."""
        return dict(self._blocks[stack.name][block].named_parameters())

    @property
    def outside(self) -> dict[str, nn.Parameter]:
        """The parameters around the blocks, without values."""
        return dict(self.model.named_parameters())

    def run_block(self, stack: Stack, block: int, weights: Mapping[str, Tensor], flow: Flow, call: Call) -> Flow:
        """One block on one batch, with `weights` by their names within the block."""
        handed = flow.handed

        def filled(value: Any) -> Any:
            return handed[value.output] if isinstance(value, Handed) else value

        arguments = tuple(filled(value) for value in call.arguments)
        keywords = {name: filled(value) for name, value in call.keywords.items()}
        if call.by_name:
            keywords[HIDDEN] = flow.hidden
        else:
            arguments = (flow.hidden, *arguments)
        found = functional_call(self._blocks[stack.name][block], dict(weights), arguments, keywords)
        return Flow(found[0], tuple(found[1:])) if isinstance(found, tuple) else Flow(found)

    def leave_out(self, missing: Iterable[str]) -> None:
        """Do without the modules at the top all of whose parameters are `missing`: a pooler that was not saved."""
        gone = set(missing)
        for name, module in list(self.model.named_children()):
            own = [f"{name}.{key}" for key, _ in module.named_parameters()]
            if own and gone.issuperset(own):
                setattr(self.model, name, None)

    @torch.no_grad()
    def record(
        self, stack: Stack, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], done: Mapping[str, Tensor]
    ) -> tuple[Flow, list[Call]]:
        """What enters the first block of a stack, and what each of its blocks is called with, for one batch.

        `weights` are the parameters around the blocks, `done` the hidden states at the end of earlier stacks. Until
        `num_handed` says how many things the stack's blocks hand on, only the first block's call is recorded.
        """
        with self._taping(stack, done) as tape:
            try:
                functional_call(self.model, dict(weights), (), dict(inputs))
            except _Reached:
                assert tape.first is not None
                return Flow(tape.first), tape.calls
        raise CheckpointError(f"{type(self.model).__name__}: its forward does not reach the last block of {stack.name}")

    def run_tail(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], done: Mapping[str, Tensor]) -> Any:
        """The trunk's output when all stacks have ended in `done`."""
        with self._taping(None, done):
            return functional_call(self.model, dict(weights), (), dict(inputs))

    def run(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Any:
        """The trunk's output with all of its blocks; `weights` are all parameters, by their names in the trunk."""
        self._tape.weights = weights
        try:
            outside = {name: weights[name] for name in self.outside}
            return functional_call(self.model, outside, (), dict(inputs))
        finally:
            self._tape.weights = None

    @property
    def tail(self) -> list[str]:
        """Parameters defined after the last block: final norm, pooler. Those that work before it get no gradient."""
        names, seen = [], False
        for name, module in self.model.named_modules():
            seen = seen or name == self.stacks[-1].name
            if seen and not isinstance(module, _Recorder):
                names += [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        return names

    @contextmanager
    def _taping(self, wanted: Stack | None, done: Mapping[str, Tensor]) -> Iterator[_Tape]:
        tape = self._tape
        tape.wanted, tape.done, tape.num_handed = wanted, done, self.num_handed
        tape.first, tape.calls = None, []
        try:
            yield tape
        finally:
            tape.done, tape.first, tape.calls = {}, None, []


def block_parameters(stack: Stack, block: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by their names within a block, from their names in the trunk."""
    prefix = stack.parameter_prefix(block)
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def output_of(found: Any) -> Tensor:
    """What feeds a head: the pooled output (B, D) where the trunk has one, else the hidden states (B, T, D)."""
    pooled = getattr(found, "pooler_output", None)
    output: Tensor = pooled if pooled is not None else found.last_hidden_state
    return output


def _build(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModel

    kind = config.get("model_type")
    try:
        settings = AutoConfig.for_model(**{**config, "model_type": kind})
        settings.use_cache = False
        with torch.device("meta"), quiet():
            return AutoModel.from_config(settings, dtype=torch.float32).eval().requires_grad_(False)
    except Exception as problem:
        raise CheckpointError(f"config.json: the trunk of a {kind!r} model cannot be built: {problem}") from None


@torch.no_grad()
def _fill_buffers(model: Any, device: str) -> None:
    """Give buffers that no checkpoint has (rotary frequencies, position numbers) their values."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            held = dict(module.named_parameters(recurse=False))
            for name in held:
                module.register_parameter(name, None)
            module.to_empty(device=device, recurse=False)
            for name, parameter in held.items():
                module.register_parameter(name, parameter)
            model._init_weights(module)


def pad_mask(inputs: Mapping[str, Tensor], hidden: Tensor, is_decoder: bool = False) -> Tensor | None:
    """1 where a position of the hidden states (B, T, D) is a token, 0 where it is padding; None if there is none."""
    for name in ("decoder_attention_mask", "attention_mask") if is_decoder else ("attention_mask",):
        mask = inputs.get(name)
        if mask is not None and mask.shape == hidden.shape[:2]:
            return mask
    return None
