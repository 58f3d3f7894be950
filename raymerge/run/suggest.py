"""What Tune asks and tells: Optuna suggests the numbers of trials, the journal keeps what became of them."""

import contextlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher

from raymerge.errors import OutputError, StorageError
from raymerge.recipe.schema import Recipe
from raymerge.recipe.space import Axis
from raymerge.run.journal import Asked, Journal, Trial
from raymerge.run.merge import Progress
from raymerge.run.sampler import draw, make_sampler, num_trials

logger = logging.getLogger("raymerge")

PROBLEM = "problem"
"""What a trial says that would fail again."""
FAULT = "fault"
"""What a trial says that its node or the storage has failed."""
# How often a trial is begun again because its process was lost; and how often because of a fault.
MAX_LOSSES = 3


class Suggester(Searcher):  # type: ignore[misc]
    """Answers Tune, which asks what to try next and tells what that reached.

    What the journal holds is asked and told once more, in the same order: the sampler then is where it was, and goes on
    as if nothing had happened. Raises OutputError if it does not suggest what it did before.
    """

    def __init__(self, recipe: Recipe, axes: Sequence[Axis], journal: Journal, progress: Progress) -> None:
        super().__init__()
        assert recipe.search is not None
        self._search = recipe.search
        self._axes = axes
        self._method = recipe.method
        self._journal = journal
        self._progress = progress
        self._total = num_trials(recipe, axes)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            sampler=make_sampler(recipe, axes),
            directions=["minimize" if lower else "maximize" for lower in self._search.lower],
        )
        self._asked: dict[int, optuna.Trial] = {}
        self._told: dict[int, Trial] = {}
        self._running: dict[str, int] = {}
        self._losses: Counter[int] = Counter()
        self._faults: Counter[int] = Counter()
        self._is_broken = False
        self.num_ended = 0
        """How many of those handed out have come back, with a result or lost."""
        self.fault: str | None = None
        """Why the search cannot go on for now."""
        self._replay()
        # Whose process, or whose driver, was lost: they are handed out again.
        self._lost = [number for number in self._asked if number not in self._told]

    @property
    def trials(self) -> list[Trial]:
        """Those that have ended, in the order they were begun."""
        return [self._told[number] for number in sorted(self._told)]

    @property
    def num_open(self) -> int:
        """How many are not among them yet."""
        return self._total - len(self._told)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The values of a trial by axis; FINISHED if there is none left to begin, or none can be."""
        if self.fault is not None:
            return str(Searcher.FINISHED)
        if self._lost:
            number = self._lost.pop(0)
        elif len(self._asked) < self._total:
            number = self._ask()
            self._note(Asked(number=number, values=self._asked[number].params))
            if self.fault is not None:
                return str(Searcher.FINISHED)
        else:
            return str(Searcher.FINISHED)
        self._running[trial_id] = number
        found: dict[str, Any] = self._asked[number].params
        return found

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take in what a trial reached; it will be begun again after a fault, or if there is no result: then its
        process was lost.
        """
        self.num_ended += 1
        number = self._running.pop(trial_id)
        if result and FAULT in result:
            self._faults[number] += 1
            if self._faults[number] <= MAX_LOSSES:
                self._lost.append(number)
            else:
                # It names the node, without which the same command may go on.
                self.fault = self.fault or result[FAULT]
            return
        if error or not result:
            self._losses[number] += 1
            if self._losses[number] <= MAX_LOSSES:
                self._lost.append(number)
                return
            result = {PROBLEM: f"its process was lost {self._losses[number]} times"}
        names = [name for name in result if name in self._search.objective or name.startswith("score.")]
        trial = Trial(
            number=number,
            values=self._asked[number].params,
            scores={} if PROBLEM in result else {name: result[name] for name in names},
            share=result.get("share", 0.0),
            merge_seconds=result.get("merge_seconds", 0.0),
            evaluate_seconds=result.get("evaluate_seconds", 0.0),
            finished_at=result.get("finished_at", 0.0),
            error=result.get(PROBLEM),
        )
        self._tell(trial)
        self._note(trial)
        self._say(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is there."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of what it is given, to restore itself from; and a bar on a terminal cannot be pickled.
        return {}

    def _replay(self) -> None:
        for event in self._journal.read():
            if isinstance(event, Trial):
                self._tell(event)
            elif (now := self._asked[self._ask()].params) != event.values:
                raise OutputError(
                    f"search: trial {event.number} was {_shown(event.values)}, and now {_shown(now)} is suggested, "
                    "as by another version of Optuna; begin anew with overwrite"
                )

    def _ask(self) -> int:
        trial = self._study.ask()
        draw(trial, self._axes, self._method)
        number: int = trial.number
        self._asked[number] = trial
        return number

    def _note(self, event: Asked | Trial) -> None:
        """Write to the journal, in which nothing is left out: after an event that could not be written, none is."""
        if self._is_broken:
            return
        try:
            self._journal.append(event)
        except StorageError as problem:
            # Tune would turn it into an error of its own.
            self._is_broken = True
            self.fault = str(problem)

    def _tell(self, trial: Trial) -> None:
        self._told[trial.number] = trial
        # The sampler of a grid stops the study at its last point, which only a loop of Optuna's own allows.
        with contextlib.suppress(RuntimeError):
            if trial.error is None:
                values = [trial.scores[name] for name in self._search.objective]
                self._study.tell(self._asked[trial.number], values)
            else:
                self._study.tell(self._asked[trial.number], state=optuna.trial.TrialState.FAIL)

    def _say(self, trial: Trial) -> None:
        done = len(self._told)
        self._progress("searching", done, self._total)
        if trial.error is not None:
            logger.warning(f"trial {done} of {self._total} failed: {_shown(trial.values)}")
            return
        name = self._search.objective[0]
        logger.info(f"trial {done} of {self._total}: {name} {trial.scores[name]:.4f}, {_shown(trial.values)}")


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
