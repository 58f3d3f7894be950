"""A recipe is read, or refused with a line that names the place and the nearest right word."""

from pathlib import Path
from typing import Any

import pytest

from raymerge.errors import RecipeError
from raymerge.recipe.load import load_recipe


def with_(**more: Any) -> dict[str, Any]:
    return {"base": "b", "experts": {"math": "m", "my-code": {"path": "c"}}, "method": "linear", **more}


READY = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("*.yml"))


def refuse(recipe: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    return str(caught.value)


def test_short_and_long_forms_are_one() -> None:
    found = load_recipe(with_())
    assert [(name, expert.path) for name, expert in found.experts.items()] == [("math", "m"), ("my-code", "c")]
    assert found == load_recipe(with_(experts={"math": {"path": "m"}, "my-code": "c"}))
    assert load_recipe(found) is found


@pytest.mark.parametrize("recipe", READY, ids=lambda recipe: recipe.stem)
def test_ready_recipes_are_recipes(recipe: Path) -> None:
    assert load_recipe(recipe).experts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bas": "x"}, "bas: unknown key; did you mean 'base'?"),
        ({"sedd": 1}, "sedd: unknown key; did you mean 'seed'?"),
        ({"experts": {"my-code": {"path": "c", "settngs": {}}}}, "experts.my-code.settngs: unknown key; did you mean"),
        ({"experts": {"a.b": {"pth": "c"}}}, "experts.a.b.pth: unknown key; did you mean 'path'?"),
        ({"output": {"dtyp": "bfloat16"}}, "output.dtyp: unknown key; did you mean 'dtype'?"),
        ({"output": {"tokens": {"<a>": {"modle": "m"}}}}, "output.tokens.<a>.modle: unknown key; did you mean 'model'"),
        ({"compute": {"worker": 1}}, "compute.worker: unknown key; did you mean 'workers'?"),
        ({"evaluate": [{"task": "t", "kind": "perplexity", "dat": "x"}]}, "evaluate.0.dat: unknown key; did you mean"),
        ({"slices": [{"source": {}}]}, "slices.0.source: unknown key; did you mean 'sources'?"),
        (
            {"slices": [{"sources": {"math": {"block": [0, 1]}}}]},
            "slices.0.sources.math.block: unknown key; did you mean 'blocks'?",
        ),
        (
            {"settings": {"coefficient": [{"filtr": "x", "value": 1}]}},
            "settings.coefficient.0.filtr: unknown key; did you mean 'filter'?",
        ),
        ({"settings": {"coeficient": 1}}, "settings.coeficient: linear has no such setting; did you mean"),
        (
            {"experts": {"math": {"path": "m", "settings": {"coefficent": 1}}}},
            "experts.math.settings.coefficent: linear has no such setting; did you mean 'coefficient'?",
        ),
        (
            {"slices": [{"sources": {"math": [0, 1]}, "settings": {"normalise": True}}]},
            "slices.0.settings.normalise: linear has no such setting; did you mean 'normalize'?",
        ),
        ({"slices": [{"sources": {"mth": [0, 1]}}]}, "slices.0.sources.mth: no such model; did you mean 'math'?"),
        ({"method": "linaer"}, "method: found 'linaer', which is no method; did you mean 'linear'?"),
        (
            {"evaluate": [{"task": "t", "kind": "perplexity", "data": "x", "expert": "mat"}]},
            "evaluate.0.expert: no expert 'mat'; did you mean 'math'?",
        ),
    ],
)
def test_an_unknown_word_gets_the_nearest(change: dict[str, Any], said: str) -> None:
    assert said in refuse(with_(**change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": "x"}, "seed: input should be a valid integer"),
        ({"method": 5}, "method: input should be a valid string"),
        ({"experts": {}}, "experts: "),
        ({"experts": ["a"]}, "experts: "),
        ({"output": "x"}, "output: "),
        ({"output": {"dtype": "int8"}}, "output.dtype: input should be 'float32', 'bfloat16' or 'float16', found"),
        ({"output": {"tokenizer": "chat"}}, "output.tokenizer: found 'chat'; base, union or an expert's name"),
        ({"output": {"missing": "ignore"}}, "output.missing: input should be 'error', 'base' or 'skip'"),
        ({"compute": {"workers": 0}}, "compute.workers: "),
        ({"settings": {"coefficient": None}}, "settings.coefficient: boolean or integer or number or string or list"),
        ({"settings": {"coefficient": "much"}}, "settings.coefficient: found 'much'; input should be a valid number"),
        ({"settings": {"coefficient": "0.5"}}, "settings.coefficient: found '0.5'; input should be a valid number"),
        ({"settings": {"coefficient": True}}, "settings.coefficient: found True; input should be a valid number"),
        ({"settings": {"coefficient": [0.1, "much"]}}, "settings.coefficient: found 'much'"),
        ({"settings": {"coefficient": [{"value": "much"}]}}, "settings.coefficient: found 'much'"),
        ({"settings": {"normalize": "yes"}}, "settings.normalize: found 'yes'; input should be a valid boolean"),
        ({"method": "karcher", "settings": {"max_iter": 2.0}}, "settings.max_iter: found 2.0"),
        (
            {"experts": {"math": {"path": "m", "settings": {"normalize": True}}}},
            "experts.math.settings.normalize: this setting of linear is for all experts; move it to settings",
        ),
        ({"method": "ties", "base": None}, "base: missing; ties merges task vectors, which need one"),
        ({"experts": {"base": "x"}}, "experts.base: this name is reserved"),
        ({"experts": {"a/b": "x"}}, "experts.a/b: this name is reserved or no folder name"),
        ({"experts": {"..": "x"}}, "experts...: this name is reserved or no folder name"),
        ({"method": "os:getcwd"}, "a subclass of raymerge.methods.base.TensorMethod is expected"),
        ({"method": "nothing_here:X"}, "method: 'nothing_here:X' could not be imported"),
        ({"method": ":"}, "method: ':' could not be imported"),
    ],
)
def test_a_wrong_value_is_refused(change: dict[str, Any], said: str) -> None:
    found = refuse(with_(**change))
    assert said in found
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize("change", [{"base": "s3://key:hunter2@b/x"}, {"experts": {"a": "s3://key:hunter2@b/x"}}])
def test_a_secret_is_not_repeated(change: dict[str, Any]) -> None:
    found = refuse(with_(**change))
    assert "credentials in a place would be in logs; give them in the environment" in found
    assert "hunter2" not in found


def test_every_mistake_is_told_at_once() -> None:
    lines = refuse({"bas": "b", "experts": {"a": {}}, "output": {"dtyp": 1}}).splitlines()
    assert {line.removeprefix("recipe: ").partition(":")[0] for line in lines} == {
        "bas",
        "experts.a.path",
        "output.dtyp",
        "method",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("- x", "found list; a mapping with base, experts and method is expected"),
        ("", "found NoneType; a mapping"),
        ("\x00", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("experts: {a: b}\nexperts: {a: c}\nmethod: linear", "a key stands twice"),
        ("experts: {a: b, a: c}\nmethod: linear", "a key stands twice"),
    ],
)
def test_malformed_yaml_is_one_readable_error(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    found = refuse(path)
    assert said in found and str(path) in found


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "No such file" in refuse(tmp_path / "none.yml")
    (tmp_path / "x.yml").write_bytes(b"\xff\xfe\x00")
    assert "not YAML" in refuse(tmp_path / "x.yml")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "1.e-3"])
def test_small_numbers_are_numbers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(f"experts: {{a: b}}\nmethod: linear\nsettings: {{coefficient: {text}}}\n")
    assert load_recipe(path).settings == {"coefficient": 0.001}


def test_as_written_is_the_same_recipe() -> None:
    recipe = load_recipe(
        with_(
            settings={"coefficient": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.5}]},
            slices=[{"sources": {"math": [0, 2], "my-code": {"blocks": [0, 2], "settings": {"coefficient": 2}}}}],
            output={"tokenizer": "math", "tokens": {"<a>": {"model": "math", "force": True}}},
            seed=3,
        )
    )
    assert load_recipe(recipe.as_written()) == recipe
    assert "arithmetic" not in recipe.as_written()


MERGEKIT = """
merge_method: ties
base_model: org/base
models:
  - {model: org/base}
  - {model: org/math@v1, parameters: {weight: 0.3, density: [0.2, 0.8], rescale: false}}
  - {model: {model: {path: other/math, revision: abc}}, parameters: {weight: [{filter: mlp, value: 1e-1}, {value: 1}]}}
parameters: {normalize: false, int8_mask: true, lambda: 0.5}
dtype: bfloat16
"""


def test_mergekit_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "m.yml"
    path.write_text(MERGEKIT)
    found = load_recipe(path)
    assert found.base == "org/base"
    assert {name: expert.path for name, expert in found.experts.items()} == {
        "math": "org/math@v1",
        "math-2": "other/math@abc",
    }
    assert found.settings == {"density": 1.0, "trim_scope": "tensor", "divisor": "none", "scale": 0.5}
    assert found.experts["math"].settings == {"coefficient": 0.3, "density": [0.2, 0.8]}
    assert (found.arithmetic, found.output.dtype, found.foreign) == ("bfloat16", "bfloat16", True)
    notes = "\n".join(found.notes)
    assert "int8_mask has no effect on ties" in notes
    assert "models.1.parameters.rescale stands under a model, where mergekit ignores it" in notes
    assert "mergekit's defaults for ties: density 1.0, trim_scope tensor" in notes
    assert "arithmetic in bfloat16" in notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: linear\nmodles: []", "modles: unknown key; did you mean 'modules'?"),
        ("merge_method: linear\nmodels: [{modle: a}]", "models.0.modle: unknown key; did you mean 'model'?"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]",
            "models.0.parameters.wieght: linear has no such parameter; did you mean 'weight'?",
        ),
        ("merge_method: linaer\nmodels: [{model: a}]", "merge_method: 'linaer' is not read; did you mean 'linear'?"),
        ("merge_method: linear\nmodels: []", "experts: "),
        ("merge_method: linear\nslices: []", "slices: "),
        ("merge_method: linear\nmodels: [{model: {}}]", "models.0.model: found {}"),
        ("merge_method: linear\nmodels: [{model: a+lora}]", "LoRA references are not read"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "a stands twice"),
        ("merge_method: linear\nmodules: {text: {}}", "modules: not read"),
        ("merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: []}]", "exactly one of models and slices"),
        ("merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: b", "tokenizer_source: b is not one of the mo"),
        ("merge_method: ties\nmodels: [{model: a}]", "base: missing"),
    ],
)
def test_mergekit_mistakes(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "m.yml"
    path.write_text(text)
    assert said in refuse(path)
