"""What every entry of the catalogue promises, for free.

Run `python tests/methods/test_invariants.py` to print a digest of what every method gives.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from raymerge import methods
from raymerge.methods.base import TensorMethod, default_of, is_per_expert, merge_whole, setting_fields
from raymerge.recipe.load import load_recipe
from raymerge.recipe.settings import resolve_settings

# Statistics of these are float sums over chunks, so chunks change the last bits.
FLOAT_STATISTICS = ("model_stock", "slerp", "nuslerp", "multislerp", "karcher", "sce")
REQUIRED = {"q": 0.7}


def settings(name: str, num_experts: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, setting in setting_fields(methods.find(name)).items():
        value = REQUIRED.get(key, default_of(setting))
        found[key] = (float(value),) * num_experts if is_per_expert(setting) else value
    return found


def build(name: str) -> tuple[TensorMethod, int]:
    cls = methods.find(name)
    num_experts = cls.num_experts[1] or 3
    return cls(**settings(name, num_experts)), num_experts


def inputs(method: TensorMethod, count: int, shape=(33, 40), dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator).to(dtype)
    experts = [(base + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
    return (base if method.needs_base else None), experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", methods.CATALOGUE)
def test_experts_equal_to_the_base_give_the_base(name, dtype):
    method, count = build(name)
    base = torch.randn(33, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    merged = merge_whole(method, base if method.needs_base else None, [base.clone() for _ in range(count)])
    # Means of equal tensors are rounded; task vectors of zero are exact.
    torch.testing.assert_close(merged, base, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)
    if method.needs_base and name != "slerp":
        assert torch.equal(merged, base)


@pytest.mark.parametrize("shape", [(), (1,), (17,), (17, 1), (1, 17), (12, 10), (3, 4, 5), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", methods.CATALOGUE)
def test_dtype_and_shape_are_kept_and_inputs_untouched(name, dtype, shape):
    method, count = build(name)
    base, experts = inputs(method, count, shape, dtype)
    before = [tensor.clone() for tensor in experts]
    merged = merge_whole(method, base, experts)
    assert merged.dtype == dtype and merged.shape == shape
    assert bool(merged.isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(before, experts, strict=True))


@pytest.mark.parametrize("name", methods.CATALOGUE)
def test_chunks_and_repeats_change_nothing(name):
    method, count = build(name)
    base, experts = inputs(method, count)
    whole = merge_whole(method, base, experts)
    assert torch.equal(whole, merge_whole(method, base, experts))
    for chunk in (40, 120, 1000):
        parts = merge_whole(method, base, experts, chunk=chunk)
        if name in FLOAT_STATISTICS:
            torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(parts, whole)


@pytest.mark.parametrize("name", methods.CATALOGUE)
def test_order_does_not_matter_to_symmetric_methods(name):
    method, count = build(name)
    # What is drawn belongs to an expert's name, here its number.
    if not method.symmetric or method.random:
        return
    base, experts = inputs(method, count)
    torch.testing.assert_close(
        merge_whole(method, base, experts[::-1]), merge_whole(method, base, experts), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", methods.CATALOGUE)
def test_settings_come_back_from_a_recipe(name):
    method, count = build(name)
    written = {
        setting.name: value[0] if isinstance(value := getattr(method, setting.name), tuple) else value
        for setting in fields(method)
    }
    experts = {f"expert{i}": f"folder{i}" for i in range(count)}
    recipe = load_recipe({"base": "base", "experts": experts, "method": name, "settings": written})
    sources = [(expert, [recipe.settings], "a.weight") for expert in experts]
    found = resolve_settings(type(method), [recipe.settings], sources, "a.weight", 0.0, ())
    assert type(method)(**found) == method


def digest() -> str:
    """Identifies the bits that every method gives."""
    found = hashlib.sha256()
    for name in methods.CATALOGUE:
        method, count = build(name)
        found.update(merge_whole(method, *inputs(method, count), chunk=200, seed=3).numpy().tobytes())
    return found.hexdigest()


def test_the_hash_seed_changes_nothing():
    digests = {
        subprocess.run(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(methods.__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


if __name__ == "__main__":
    print(digest())
