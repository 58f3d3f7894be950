"""Instances of methods with their defaults, and tensors whose task vectors are exact in any order of arithmetic."""

from dataclasses import MISSING
from typing import Any

import torch
from torch import Tensor

from raymerge import methods
from raymerge.methods.base import TensorMethod, default_of, is_per_expert, setting_fields

REQUIRED = {"q": 0.7}


def instance(name: str, experts: int, **settings: Any) -> TensorMethod:
    """A checked method for so many experts: defaults but for `settings`; one number stands for all experts."""
    method = methods.find(name)
    given = {}
    for key, field in setting_fields(method).items():
        value = settings.pop(key, default_of(field))
        value = REQUIRED[key] if value is MISSING else value
        repeat = is_per_expert(field) and not isinstance(value, tuple)
        given[key] = (value,) * experts if repeat else value
    assert not settings, f"{name} has no {list(settings)}"
    built = method(**given)
    built.check()
    return built


def exact(shape: tuple[int, ...], experts: int, seed: int = 0, grid: int = 1024) -> tuple[Tensor, list[Tensor]]:
    """Base and experts on a grid: float32 subtracts them exactly, and many magnitudes are equal."""
    draw = torch.Generator().manual_seed(seed)

    def numbers() -> Tensor:
        return (torch.randn(shape, generator=draw) * grid).round() / grid

    base = numbers()
    return base, [base + numbers() for _ in range(experts)]
