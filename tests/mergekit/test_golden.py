"""mergekit's recipes give mergekit's numbers: every tensor against golden ones that mergekit 0.1.5 wrote.

The unit of every tolerance is one ulp of the output's dtype, taken at the larger of the two entries, or at
the tensor's root mean square where both are smaller (they are then small differences of larger terms).
`make_golden.py` made the golden tensors, `checkpoints.py` makes the inputs again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import build_checkpoints, digest, render
from random_statistics import NUM_SEEDS, RANDOM_RECIPES, describe
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from raymerge import api
from raymerge.recipe.load import load_recipe

HERE = Path(__file__).parent
RECIPES = sorted(path.stem for path in (HERE / "recipes").glob("*.yml"))
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")

# The allowed distance in ulps. 16-bit outputs are within one rounding; sums in float32 end differently when
# they are added up in another order, a few ulps of float32 or some 5e-7.
ULPS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 8.0}

# mergekit computes these in bfloat16 from first to last (norms, cosines and coefficients too) and so misses
# its own float32 result by several ulps; ours rounds once. Ours must be within one rounding of mergekit's
# float32 result from the same inputs, and within this many ulps of its bfloat16 one.
ROUNDED_THROUGHOUT = {
    "karcher": 3,
    "model_stock": 3,
    "model_stock_filter_wise": 6,
    "multislerp": 4,
    "nuslerp": 3,
    "nuslerp_columns": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("checkpoints")
    build_checkpoints(found)
    return found


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Recipes name checkpoints relative to the working directory."""
    monkeypatch.chdir(folder)
    yield


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def golden(recipe: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = HERE / "golden" / f"{recipe}.safetensors"
    with safe_open(file, "pt") as opened:
        return load_file(file), {key: json.loads(value) for key, value in opened.metadata().items()}


def ulps_apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of two tensors of one dtype, in its ulps."""
    left, right = ours.double(), theirs.double()
    size = torch.maximum(left.abs(), right.abs()).clamp(min=float(right.square().mean().sqrt()))
    _, exponent = torch.frexp(size)
    ulp = torch.pow(2.0, exponent.double() - 1 - MANTISSA_BITS[ours.dtype])
    return float(torch.where(left == right, 0, (left - right).abs() / ulp).max())


def align(name: str, tensor: Tensor, out: Path, facts: dict[str, Any]) -> Tensor:
    """Rows of ours in the order of mergekit's vocabulary: it numbers new tokens in the order of a hash set.

    Rows past the vocabulary are left out: they have no token. mergekit fills them with the mean row, we do not.
    """
    if name not in VOCABULARY_TENSORS:
        return tensor
    ours: dict[str, int] = AutoTokenizer.from_pretrained(out).get_vocab()
    theirs: dict[str, int] = facts["vocabulary"]
    assert ours.keys() == theirs.keys()
    return tensor[[ours[token] for token in sorted(theirs, key=theirs.__getitem__)]]


def test_inputs_are_what_mergekit_merged(folder: Path) -> None:
    found = digest(folder)
    for recipe in RECIPES:
        facts = golden(recipe)[1]
        assert (facts["inputs"], facts["mergekit"]) == (found, "0.1.5"), recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_deterministic_recipe(recipe: str, tmp_path: Path) -> None:
    theirs, facts = golden(recipe)
    out = tmp_path / "out"
    api.merge(HERE / "recipes" / f"{recipe}.yml", out, local=True)
    ours = read(out)
    assert ours.keys() == theirs.keys()
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in facts["config"]} == facts["config"]
    exact = golden(f"{recipe}_float32")[0] if recipe in ROUNDED_THROUGHOUT else {}
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        mine = align(name, ours[name], out, facts)
        wanted = tensor[: len(mine)]
        allowed = ROUNDED_THROUGHOUT.get(recipe, ULPS[tensor.dtype])
        assert ulps_apart(mine, wanted) <= allowed, name
        if name in exact:
            assert ulps_apart(mine, exact[name].to(mine.dtype)) <= ULPS[tensor.dtype], name


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.startswith("chat_template")])
def test_chat_template(recipe: str, tmp_path: Path) -> None:
    facts = golden(recipe)[1]
    out = tmp_path / "out"
    api.merge(HERE / "recipes" / f"{recipe}.yml", out, local=True)
    assert render(AutoTokenizer.from_pretrained(out)) == facts["conversation"]


@pytest.mark.parametrize("recipe", RANDOM_RECIPES)
def test_random_recipe(recipe: str, folder: Path, tmp_path: Path) -> None:
    """Statistics over seeds agree within five standard errors; what does not vary, within 1e-5."""
    stored = json.loads((HERE / "golden" / "random.json").read_text())
    loaded = load_recipe(RANDOM_RECIPES[recipe])
    runs = []
    for seed in range(NUM_SEEDS):
        out = tmp_path / str(seed)
        api.merge(loaded.model_copy(update={"seed": seed}), out, local=True)
        runs.append(describe(read(out), folder))
    for key, (mean, deviation) in stored[recipe].items():
        values = torch.tensor([run[key] for run in runs], dtype=torch.float64)
        error = ((values.var() / NUM_SEEDS + deviation**2 / stored["seeds"]) ** 0.5).item()
        assert abs(values.mean().item() - mean) <= 5 * error + 1e-5 * abs(mean), (key, values.mean().item(), mean)
