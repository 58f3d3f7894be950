"""How blocks are fitted, and what of it is the same for all blocks."""

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["element", "tensor", "block", "task"]
Inputs = Literal["dual", "single"]
Schedule = Literal["progressive", "parallel", "whole"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSettings:
    """What a fit needs beside weights and data; the method's fields say what each means."""

    granularity: Granularity
    inputs: Inputs
    schedule: Schedule
    epochs: int
    correction_epochs: int
    lr: float
    plateau: float
    fit_tail: bool
    seed: int
