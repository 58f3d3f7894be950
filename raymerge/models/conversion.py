"""Between the tensors of a checkpoint and the parameters of a model, which may be named and laid out otherwise.

transformers renames tensors as it loads them, and stacks those of a mixture's experts into one parameter. The
same rules are applied here to any part of a checkpoint, and back, without a model in memory.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Conversion:
    """The rules of one model. Names that the model has no parameter for are left out on the way in."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._known = model.state_dict()
        rules = get_model_conversion_mapping(model) or []
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def parameter_of(self, name: str) -> tuple[str | None, str | None]:
        """The parameter that a checkpoint's tensor is, or is a part of, and the pattern of the rule that says so."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        found, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._known)
        if found not in self._known:
            found, pattern = rename_source_key(name, [], [], prefix, self._known)
        return (found, pattern) if found in self._known else (None, None)

    def to_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by their names in the model, from tensors by their names in a checkpoint."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, Tensor] = {}
        begun: dict[str, Any] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = self.parameter_of(name)
            if target is None:
                continue
            if pattern is None:
                found[target] = tensors[name]
            else:
                rule = begun.setdefault(target, deepcopy(self._rule(pattern)))
                rule.add_tensor(target, name, pattern, tensors[name])
        for target, rule in begun.items():
            found |= self._run(rule, target)
        return found

    def to_checkpoint(self, names: Iterable[str], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors `names` of a checkpoint from the model's parameters; those that are no parameter are left out."""
        found: dict[str, Tensor] = {}
        stacked: dict[str, list[str]] = {}
        for name in names:
            target, pattern = self.parameter_of(name)
            if target is None:
                continue
            if pattern is None:
                found[name] = parameters[target]
            else:
                stacked.setdefault(f"{target}\0{id(self._rule(pattern))}", []).append(name)
        for key, sources in stacked.items():
            found |= self._unstack(key.partition("\0")[0], sources, parameters)
        return found

    def _unstack(self, target: str, sources: list[str], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import apply_converters, apply_renamings

        pattern = self.parameter_of(sources[0])[1]
        assert pattern is not None
        back = self._rule(pattern).reverse_transform()
        first, matched = apply_converters(target, [back])
        assert matched is not None, f"{target}: the rule that made it does not know it"
        back.add_tensor(first, target, matched, parameters[target])
        parts = self._run(back, first)
        # The parts are named as after renaming, before stacking, and as the trunk names them.
        renamed = {name: apply_renamings(name, self._renamings) for name in sources}
        prefix = f"{self._model.base_model_prefix}."
        return {name: parts[key if key in parts else key.removeprefix(prefix)] for name, key in renamed.items()}

    def _rule(self, pattern: str) -> Any:
        return next(rule for rule in self._converters if pattern in rule.source_patterns)

    def _run(self, rule: Any, name: str) -> dict[str, Tensor]:
        made = rule.convert(name, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
