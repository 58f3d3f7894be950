"""ProDistill (Xu, Li, Zhang 2025, arXiv:2502.12706): coefficients fitted block by block to the experts' activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from raymerge.distill.settings import FitSettings, Granularity, Inputs, Schedule
from raymerge.methods.base import LearnedMethod, PerExpert, per_expert, require
from raymerge.ops.consensus import plain_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class Prodistill(LearnedMethod):
    """`base + sum_i L_i * (x_i - base)`, every element of L fitted on a few dozen unlabelled samples per expert."""

    elementwise: ClassVar[bool] = True

    coefficient: PerExpert = per_expert(default=0.3)
    """What all of an expert's coefficients are at the start, and what merges everything around the blocks."""

    granularity: Granularity = "element"
    """One coefficient per expert for each element, tensor or block, or (task) one for all that is fitted."""

    inputs: Inputs = "dual"
    """Teachers read what their own expert gives them (dual), or what the merged model does (single, an ablation)."""

    schedule: Schedule = "progressive"
    """Block after block, as published; parallel: every block on its teachers' inputs, an approximation; whole: all
    blocks as one on the experts' outputs alone (an ablation), for models that fit in memory."""

    epochs: int = 50
    """Passes over the samples per block; 0 leaves the coefficients as they are."""

    correction_epochs: int = 0
    """With schedule parallel: passes per block, one after the other, that correct the first fit."""

    lr: float = 0.01
    """Learning rate of Adam."""

    batch_size: int = 16
    """Samples per step, over all workers."""

    samples: int = 64
    """Rows taken from each expert's calibration data, at most."""

    max_length: int = 128
    """Tokens a row is cut to."""

    plateau: float = 0.0
    """A block ends when its loss has fallen by less than this share over three epochs; 0: never."""

    fit_tail: bool = False
    """Fit what stands between the last block and the head (final norm, pooler) as one more step."""

    blocks: str = ""
    """Name of the list of blocks, where it is not clear."""

    def check(self) -> None:
        for name, least in {
            "epochs": 0,
            "correction_epochs": 0,
            "batch_size": 1,
            "samples": 1,
            "max_length": 1,
        }.items():
            found = getattr(self, name)
            require(found >= least, f"settings.{name}: found {found}; {least} or more is expected")
        require(self.lr > 0, f"settings.lr: found {self.lr}; a number above 0 is expected")
        require(0 <= self.plateau < 1, f"settings.plateau: found {self.plateau}; 0 or more and below 1 is expected")
        require(
            self.schedule == "parallel" or not self.correction_epochs,
            "settings.correction_epochs: corrects schedule: parallel; the others need none",
        )
        require(
            self.schedule == "whole" or self.granularity != "task",
            "settings.granularity: task spans all blocks, which are fitted apart; set schedule: whole",
        )

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        return base + plain_sum([expert - base for expert in experts], self.coefficient, None)

    def fit_settings(self, seed: int) -> FitSettings:
        return FitSettings(
            granularity=self.granularity,
            inputs=self.inputs,
            schedule=self.schedule,
            epochs=self.epochs,
            correction_epochs=self.correction_epochs,
            lr=self.lr,
            plateau=self.plateau,
            fit_tail=self.fit_tail,
            seed=seed,
        )
