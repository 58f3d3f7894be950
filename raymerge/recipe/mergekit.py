"""Read a mergekit YAML (0.1.5) as a recipe that gives mergekit's numbers.

A mergekit method is one of ours with other defaults: trimming per tensor, L1 rescaling, division by
the sum of weights, arithmetic in `dtype`. What is translated or has no effect is noted, for the plan
to print. Not read: `modules:`, LoRA references (`path+lora`), and methods outside our catalogue.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from raymerge.errors import RecipeError, nearest
from raymerge.recipe.schema import Filtered, Part, Recipe, Setting, Settings
from raymerge.recipe.validation import validate


class Model(Part):
    model: str | dict[str, Any]
    parameters: Settings | None = None


class SliceSource(Model):
    layer_range: tuple[int, int]


class OutputSlice(Part):
    sources: list[SliceSource]
    base_model: str | dict[str, Any] | None = None
    residual_weight: float | None = None
    parameters: Settings | None = None


class Tokenizer(Part):
    source: str | dict[str, Any] = "union"
    tokens: dict[str, dict[str, Any]] | None = None
    pad_to_multiple_of: int | None = None


class Configuration(Part):
    """mergekit's schema; unlike mergekit's own, it refuses unknown keys."""

    merge_method: str
    models: list[Model] | None = None
    slices: list[OutputSlice] | None = None
    modules: dict[str, Any] | None = None
    base_model: str | dict[str, Any] | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    out_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    tokenizer_source: str | dict[str, Any] | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: Settings | None = None


def _same(value: Any) -> Any:
    return value


def _divisor(normalize: Any) -> str:
    return "coefficient" if normalize else "none"


def _rescale(rescale: Any) -> str:
    return "l1" if rescale else "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """How a mergekit method maps onto ours.

    `names` maps a parameter to our setting and its value; `narrow` are those that may stand under a
    model; `defaults` are mergekit's, as our settings; `ignored` have no effect on numbers.
    """

    names: Mapping[str, tuple[str, Callable[[Any], Any]]]
    narrow: tuple[str, ...] = ("weight", "density", "gamma", "epsilon", "scale")
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def _sparse(names: tuple[str, ...], defaults: Mapping[str, Any]) -> Translation:
    extra: dict[str, tuple[str, Callable[[Any], Any]]] = {name: (name, _same) for name in names}
    return Translation(
        names={
            "weight": ("coefficient", _same),
            "lambda": ("scale", _same),
            "normalize": ("divisor", _divisor),
            "rescale": ("rescale", _rescale),
            **extra,
        },
        defaults={"density": 1.0, **defaults},
        required=("coefficient",),
        ignored=("int8_mask",),
    )


METHODS = {
    "linear": Translation(
        names={"weight": ("coefficient", _same), "normalize": ("normalize", _same)}, required=("coefficient",)
    ),
    "task_arithmetic": Translation(
        names={
            "weight": ("coefficient", _same),
            "lambda": ("scale", _same),
            "normalize": ("divisor", _divisor),
        },
        required=("coefficient",),
        ignored=("int8_mask", "density", "rescale"),
    ),
    "ties": _sparse(("density",), {"trim_scope": "tensor", "divisor": "coefficient"}),
    "dare_linear": _sparse(("density",), {"rescale": "l1"}),
    "dare_ties": _sparse(("density",), {"rescale": "l1", "divisor": "none"}),
    "breadcrumbs": _sparse(("density", "gamma"), {"trim_scope": "tensor", "gamma": 0.01}),
    "breadcrumbs_ties": _sparse(("density", "gamma"), {"trim_scope": "tensor", "gamma": 0.01, "divisor": "none"}),
    "della": _sparse(("density", "epsilon"), {"rescale": "l1", "divisor": "coefficient"}),
    "della_linear": _sparse(("density", "epsilon"), {"rescale": "l1"}),
    "model_stock": Translation(names={"filter_wise": ("filter_wise", _same)}),
    "slerp": Translation(names={"t": ("t", _same)}, required=("t",)),
    "nuslerp": Translation(
        names={"weight": ("coefficient", _same)},
        required=("coefficient",),
        ignored=("nuslerp_flatten", "nuslerp_row_wise"),
    ),
    "multislerp": Translation(
        names={
            "weight": ("coefficient", _same),
            "normalize_weights": ("normalize", _same),
            "eps": ("eps", _same),
        },
        required=("coefficient",),
    ),
    "karcher": Translation(names={"max_iter": ("max_iter", _same), "tol": ("tol", _same)}),
    "sce": Translation(names={"select_topk": ("select_topk", _same)}, ignored=("int8_mask",)),
    "passthrough": Translation(names={"scale": ("scale", _same)}),
}
# Methods to which the base is one more input, not the origin of task vectors.
_BASE_IS_INPUT = ("linear", "karcher", "passthrough")


def read(content: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from the content of a mergekit YAML. Raises RecipeError."""
    config = validate(Configuration, content, where, " (mergekit format)")
    return _Reading(config, where).recipe()


class _Reading:
    """One YAML while it is read: the names given to its models, and the notes taken."""

    def __init__(self, config: Configuration, where: str) -> None:
        self.config = config
        self.where = where
        self.notes: list[str] = []
        self.names: dict[str, str] = {}
        if config.merge_method not in METHODS:
            raise RecipeError(
                f"{where}: merge_method: {config.merge_method!r} is not read; {nearest(config.merge_method, METHODS)}"
            )
        if config.modules:
            raise RecipeError(f"{where}: modules: not read; write one recipe per module")
        if (config.models is None) == (config.slices is None):
            raise RecipeError(f"{where}: exactly one of models and slices is expected")
        self.mapping = METHODS[config.merge_method]
        self.base = self.reference(config.base_model, "base_model") if config.base_model else None

    def reference(self, ref: Any, place: str) -> str:
        """The path or hub id[@revision] of a model reference."""
        if isinstance(ref, dict):
            inner = ref.get("model", ref)
            if "lora" in ref and ref["lora"] is not None:
                raise RecipeError(f"{self.where}: {place}: LoRA references are not read; merge the adapter first")
            if isinstance(inner, str):
                return inner
            if not isinstance(inner, dict) or not isinstance(inner.get("path"), str):
                raise RecipeError(
                    f"{self.where}: {place}: found {ref!r}; a path, or a mapping with a path, is expected"
                )
            revision = inner.get("revision")
            return f"{inner['path']}@{revision}" if revision else str(inner["path"])
        if "+" in str(ref):
            raise RecipeError(f"{self.where}: {place}: LoRA references are not read; merge the adapter first")
        return str(ref)

    def name(self, path: str) -> str:
        """The expert's name of a model: the last part of its path, numbered where it is taken."""
        if path not in self.names:
            stem = PurePosixPath(path.partition("@")[0]).name.strip(".") or "model"
            taken = {"base", "union", "auto", *self.names.values()}
            name, number = stem, 2
            while name in taken:
                name, number = f"{stem}-{number}", number + 1
            self.names[path] = name
        return self.names[path]

    def settings(self, parameters: Settings | None, place: str, narrow: bool = False) -> dict[str, Any]:
        """Our settings for mergekit parameters."""
        found: dict[str, Any] = {}
        for key, value in (parameters or {}).items():
            if key in self.mapping.ignored:
                if not key.startswith("nuslerp"):
                    self.note(f"{key} has no effect on {self.config.merge_method}")
                continue
            if key not in self.mapping.names:
                raise RecipeError(
                    f"{self.where}: {place}.{key}: {self.config.merge_method} has no such parameter; "
                    f"{nearest(key, self.mapping.names)}"
                )
            if narrow and key not in self.mapping.narrow:
                self.note(f"{place}.{key} stands under a model, where mergekit ignores it; so do we")
                continue
            ours, convert = self.mapping.names[key]
            found[ours] = _convert(value, convert)
        return found

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def recipe(self) -> Recipe:
        config = self.config
        experts: dict[str, dict[str, Any]] = {}
        slices: list[dict[str, Any]] | None = None
        base_is_input = config.merge_method in _BASE_IS_INPUT
        if config.models is not None:
            for i, listed in enumerate(config.models):
                path = self.reference(listed.model, f"models.{i}.model")
                if path == self.base and not base_is_input:
                    continue
                if path in self.names:
                    raise RecipeError(f"{self.where}: models.{i}: {path} stands twice; mergekit would drop one")
                experts[self.name(path)] = {
                    "path": path,
                    "settings": self.settings(listed.parameters, f"models.{i}.parameters", narrow=True),
                }
            if self.base and base_is_input and self.base not in self.names:
                self.note("the base is not listed, so mergekit adds it as one more input; so do we")
                experts[self.name(self.base)] = {"path": self.base}
        else:
            slices = [self.slice(i, part, experts, base_is_input) for i, part in enumerate(config.slices or [])]
        settings = {**self.mapping.defaults, **self.settings(config.parameters, "parameters")}
        if config.merge_method == "nuslerp":
            settings["over"] = self._nuslerp_over()
        method_notes = ", ".join(f"{key} {value}" for key, value in self.mapping.defaults.items())
        if method_notes:
            self.note(f"mergekit's defaults for {config.merge_method}: {method_notes}")
        self.note(
            f"arithmetic in {config.dtype or 'the stored dtype'}, as mergekit does"
            + ("; linear always in float32" if config.merge_method == "linear" else "")
        )
        recipe = validate(
            Recipe,
            {
                "base": self.base,
                "experts": experts,
                "method": config.merge_method,
                "settings": settings,
                "slices": slices,
                "arithmetic": config.dtype or "stored",
                "output": self.output(),
            },
            self.where,
        )
        return recipe.annotated(tuple(f"mergekit: {note}" for note in self.notes), self.mapping.required)

    def slice(
        self, number: int, part: OutputSlice, experts: dict[str, dict[str, Any]], base_is_input: bool
    ) -> dict[str, Any]:
        if part.base_model is not None and self.reference(part.base_model, "base_model") != self.base:
            raise RecipeError(f"{self.where}: slices.{number}.base_model: another base per slice is not read")
        sources: dict[str, Any] = {}
        for i, source in enumerate(part.sources):
            place = f"slices.{number}.sources.{i}"
            path = self.reference(source.model, f"{place}.model")
            is_base = path == self.base and not base_is_input
            name = "base" if is_base else self.name(path)
            if name in sources:
                raise RecipeError(f"{self.where}: {place}: {path} stands twice in one slice; mergekit would drop one")
            if not is_base:
                experts.setdefault(name, {"path": path})
            settings = {} if is_base else self.settings(source.parameters, f"{place}.parameters", narrow=True)
            sources[name] = {"blocks": source.layer_range, "settings": settings}
        return {"sources": sources, "settings": self.settings(part.parameters, f"slices.{number}.parameters")}

    def _nuslerp_over(self) -> str:
        parameters = self.config.parameters or {}
        flatten = parameters.get("nuslerp_flatten", True)
        row_wise = parameters.get("nuslerp_row_wise", False)
        if not isinstance(flatten, bool) or not isinstance(row_wise, bool):
            raise RecipeError(f"{self.where}: parameters: nuslerp_flatten and nuslerp_row_wise must be true or false")
        # mergekit's row_wise interpolates along dimension 0, that is, whole columns.
        return "tensor" if flatten else "column" if row_wise else "row"

    def output(self) -> dict[str, Any]:
        config = self.config
        found: dict[str, Any] = {
            "dtype": config.out_dtype or config.dtype,
            "chat_template": config.chat_template,
        }
        if config.tokenizer and config.tokenizer_source:
            raise RecipeError(f"{self.where}: tokenizer and tokenizer_source are both given; keep one")
        if config.tokenizer:
            found["tokenizer"] = self.model_name(config.tokenizer.source, "tokenizer.source")
            found["pad_to_multiple_of"] = config.tokenizer.pad_to_multiple_of or 1
            found["tokens"] = {
                token: self.token(rule, f"tokenizer.tokens.{token}")
                for token, rule in (config.tokenizer.tokens or {}).items()
            }
        elif config.tokenizer_source:
            found["tokenizer"] = self.model_name(config.tokenizer_source, "tokenizer_source")
            # mergekit drops rows without a token.
            found["pad_to_multiple_of"] = 1
        return found

    def model_name(self, ref: Any, place: str) -> str:
        """`base`, `union`, or the name of the expert that a reference means."""
        if ref in ("base", "union"):
            return str(ref)
        path = self.reference(ref, place)
        if path == self.base:
            return "base"
        if path not in self.names:
            raise RecipeError(f"{self.where}: {place}: {path} is not one of the models")
        return self.names[path]

    def token(self, rule: Mapping[str, Any], place: str) -> dict[str, Any]:
        source, force = rule.get("source"), bool(rule.get("force", False))
        if isinstance(source, dict) and source.get("kind") == "zero":
            return {"force": force}
        if isinstance(source, dict) and source.get("kind") == "model_token":
            return {
                "model": self.model_name(source.get("model"), place),
                "token": source.get("token"),
                "token_id": source.get("token_id"),
                "force": force,
            }
        return {"model": self.model_name(source, place), "force": force}


def _convert(setting: Setting, convert: Callable[[Any], Any]) -> Any:
    """Convert the values in a setting, keeping gradients and filters."""
    if not isinstance(setting, list):
        return convert(setting)
    return [
        {"filter": item.filter, "value": _convert(item.value, convert)} if isinstance(item, Filtered) else convert(item)
        for item in setting
    ]
