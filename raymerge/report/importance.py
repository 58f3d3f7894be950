"""How much each setting of a search matters for an objective, by PED-ANOVA (arXiv:2304.10255) in Optuna."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna

# With fewer trials shares mean nothing.
ENOUGH = 8


def importance(
    trials: Sequence[Mapping[str, Any]], axes: Sequence[str], objective: str, lower: bool
) -> dict[str, float]:
    """Shares that add up to 1, largest first; empty with too few trials, or axes that only some trials have."""
    common = [name for name in axes if all(trial[name] is not None for trial in trials)]
    varied = [name for name in common if len({trial[name] for trial in trials}) > 1]
    if len(trials) < ENOUGH or not varied:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if lower else "maximize")
    kinds = {name: _distribution([trial[name] for trial in trials]) for name in varied}
    for trial in trials:
        study.add_trial(
            optuna.create_trial(
                params={name: trial[name] for name in varied}, distributions=kinds, value=trial[objective]
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    total = sum(found.values())
    return {name: value / total for name, value in found.items()} if total else {}


def _distribution(values: Sequence[Any]) -> Any:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return optuna.distributions.FloatDistribution(min(values), max(values))
    return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))
