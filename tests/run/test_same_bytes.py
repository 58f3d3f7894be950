"""The same recipe gives the same bytes: in this process, on Ray, on any number of workers, under any hash seed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import python
from tiny import load, make_llama, numbers, recipe, save, weights

from raymerge import api
from raymerge.errors import CheckpointError, NonFiniteTensor, RecipeError, StorageError

# One of each kind: elementwise, whole-model statistics, random with statistics, random, statistics per tensor,
# whole tensors, rows.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "model_stock": {},
    "slerp": {"t": 0.3},
    "iso_c": {},
    "pcb": {},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(("base", "a", "b", "c")):
        # A tensor of several chunks, the last of them short.
        big = numbers({"big.weight": (700, 1024)}, seed, 0)["big.weight"].to(torch.bfloat16)
        make_llama(folder / name, seed, dtype=torch.bfloat16, extra={"big.weight": big})
    return folder


def ask(family: Path, method: str) -> dict[str, Any]:
    experts = ("a",) if method == "slerp" else ("a", "b", "c")
    return recipe(
        family / "base",
        *(family / name for name in experts),
        method=method,
        settings=METHODS[method],
        output={"shard_size": 5000},
        seed=5,
    )


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("method", METHODS)
def test_local_ray_and_any_number_of_workers(family: Path, tmp_path: Path, method: str) -> None:
    runs: dict[str, dict[str, Any]] = {
        "local": {"local": True},
        "one": {"local": True, "workers": 1},
        "five": {"local": True, "workers": 5},
        "ray": {},
        "ray_one": {"workers": 1},
    }
    for name, how in runs.items():
        result = api.merge(ask(family, method), tmp_path / name, **how)
        assert len(result.plan.shards) > 3
    first = weights(tmp_path / "local")
    for name in runs:
        assert weights(tmp_path / name) == first, name
    merged, base = load(tmp_path / "local"), load(family / "base")
    assert merged.keys() == base.keys()
    assert not any(torch.equal(merged[name], base[name]) for name in ("big.weight", "lm_head.weight"))


def test_another_hash_seed_and_another_order_of_threads(family: Path, tmp_path: Path) -> None:
    text = (
        "import json, sys; from raymerge import api\n"
        "for i, recipe in enumerate(json.loads(sys.argv[1])): api.merge(recipe, f'{sys.argv[2]}/{i}', local=True)"
    )
    recipes = [ask(family, method) for method in METHODS]
    for seed in ("1", "77"):
        done = python(text, json.dumps(recipes), tmp_path / seed, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
    for i in range(len(recipes)):
        assert weights(tmp_path / "1" / str(i)) == weights(tmp_path / "77" / str(i))
    expected = tmp_path / "here"
    api.merge(recipes[1], expected, local=True)
    assert weights(expected) == weights(tmp_path / "1" / "1")


def test_another_seed_draws_other_numbers(family: Path, tmp_path: Path) -> None:
    api.merge(ask(family, "dare_ties"), tmp_path / "five", local=True)
    api.merge({**ask(family, "dare_ties"), "seed": 6}, tmp_path / "six", local=True)
    assert weights(tmp_path / "five") != weights(tmp_path / "six")


# -- errors while merging leave nothing that looks finished


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "iso_c", "dare_ties"])
def test_a_bad_number_in_an_input_is_named(family: Path, tmp_path: Path, method: str, bad: float) -> None:
    tensors = load(family / "a")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = bad
    save(tmp_path / "a", tensors, json.loads((family / "a" / "config.json").read_text()))
    asked = ask(family, method)
    asked["experts"]["a"] = str(tmp_path / "a")
    with pytest.raises(
        NonFiniteTensor, match=rf"{tmp_path}/a/model.safetensors: model.layers.1.mlp.up_proj.weight: holds NaN or infin"
    ):
        api.merge(asked, tmp_path / "out", local=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_session")
def test_a_bad_number_found_by_a_worker(family: Path, tmp_path: Path) -> None:
    tensors = load(family / "b")
    tensors["big.weight"][-1, -1] = float("nan")
    save(tmp_path / "b", tensors, json.loads((family / "b" / "config.json").read_text()))
    asked = ask(family, "linear")
    asked["experts"]["b"] = str(tmp_path / "b")
    with pytest.raises(NonFiniteTensor, match=r"model.safetensors: big.weight: holds NaN or infinity; repair or leave"):
        api.merge(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_number_in_a_copied_tensor(tmp_path: Path) -> None:
    save(tmp_path / "base", {"w": torch.ones(3), "head": torch.tensor([1.0, float("nan")])}, {"model_type": "x"})
    save(tmp_path / "a", {"w": torch.ones(3)})
    asked = recipe(tmp_path / "base", tmp_path / "a", output={"missing": "skip"})
    with pytest.raises(NonFiniteTensor, match="base/model.safetensors: head: holds NaN or infinity"):
        api.merge(asked, tmp_path / "out", local=True)


@pytest.mark.parametrize(("dtype", "large"), [("float16", 60000.0), ("bfloat16", 3.3e38)])
def test_overflow_is_an_error_not_infinity(tmp_path: Path, dtype: str, large: float) -> None:
    for name, value in (("base", 0.0), ("a", large), ("b", large)):
        save(tmp_path / name, {"w": torch.full((4,), value)})
    asked = recipe(
        tmp_path / "base",
        tmp_path / "a",
        tmp_path / "b",
        method="task_arithmetic",
        settings={"coefficient": 1.0},
        output={"dtype": dtype},
    )
    with pytest.raises(NonFiniteTensor, match="w: the inputs are finite, the result is not: it overflows"):
        api.merge(asked, tmp_path / "out", local=True)
    assert not (tmp_path / "out").exists()


def test_a_copied_tensor_that_overflows_the_output(tmp_path: Path) -> None:
    """The base's own head, beyond float16, where the output is float16."""
    save(tmp_path / "base", {"w": torch.ones(3), "head": torch.tensor([1e6])}, {"model_type": "x"})
    save(tmp_path / "a", {"w": torch.ones(3)})
    asked = recipe(tmp_path / "base", tmp_path / "a", output={"missing": "skip", "dtype": "float16"})
    with pytest.raises(NonFiniteTensor, match="head: overflows F16; set output.dtype to a wider one"):
        api.merge(asked, tmp_path / "out", local=True)


def test_gpus_need_ray(family: Path, tmp_path: Path) -> None:
    asked = {**ask(family, "linear"), "compute": {"gpus_per_worker": 1}}
    with pytest.raises(RecipeError, match="compute.gpus_per_worker: GPUs are requested through Ray; leave out --local"):
        api.merge(asked, tmp_path / "out", local=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_this_machine_does_not_have(family: Path, tmp_path: Path) -> None:
    asked = {**ask(family, "linear"), "compute": {"gpus_per_worker": 1}}
    with pytest.raises(RecipeError, match="compute.gpus_per_worker: 1 GPUs asked for, this machine has 0"):
        api.merge(asked, tmp_path / "out")


def test_an_input_that_vanishes_is_named(family: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b", "c"):
        save(tmp_path / name, load(family / name), json.loads((family / name / "config.json").read_text()))
    planned: list[Path] = []

    def remove(*_: Any) -> None:
        if not planned:
            planned.append(tmp_path / "b" / "model.safetensors")
            planned[0].unlink()

    with pytest.raises((CheckpointError, StorageError), match=r"b/model.safetensors"):
        api.merge(ask(tmp_path, "ties"), tmp_path / "out", local=True, workers=1, progress=remove)
    assert planned and not (tmp_path / "out").exists()
