"""The facts of a run, `raymerge/run.json`: versions, inputs, timings, memory; written last, it marks completion."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raymerge.checkpoint.model_folder import write_json
from raymerge.plan.execute import ShardReport
from raymerge.plan.schema import Plan

# Scores of a merged model, the base and the experts, where they were measured.
EVALUATION = "raymerge/evaluation.json"

PACKAGES = ("torch", "transformers", "safetensors", "ray", "deepspeed", "numpy")


def write_facts(
    folder: Path,
    plan: Plan,
    fits: Sequence[Mapping[str, object]],
    reports: Sequence[ShardReport],
    *,
    runner: str,
    elapsed_seconds: float,
    peak_bytes: int,
    resumed: int,
) -> None:
    """Write `raymerge/run.json` below `folder`. `fits` are the curves of what was learned, `resumed` counts
    shards that an earlier run had finished."""
    write_json(
        folder / "raymerge" / "run.json",
        {
            "complete": True,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "raymerge": plan.version,
            "python": platform.python_version(),
            "packages": {name: found for name in PACKAGES if (found := _version(name))},
            "method": plan.method,
            "seed": plan.seed,
            "plan_sha256": plan.digest,
            "inputs": [
                {"name": model.name, "place": str(model.location), "sha256_of_headers": model.fingerprint}
                for model in plan.models
            ],
            "runner": runner,
            "elapsed_seconds": round(elapsed_seconds, 3),
            "peak_bytes": peak_bytes,
            "predicted_peak_bytes_per_worker": plan.cost.peak_bytes_per_worker,
            "shards_resumed": resumed,
            "shards": [asdict(report) for report in sorted(reports, key=lambda report: report.file)],
            **_learning(plan, fits),
            "notes": list(plan.notes),
        },
    )


def _learning(plan: Plan, fits: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """Losses of every unit, epoch by epoch, and the samples they were learned from."""
    if plan.distillation is None:
        return {}
    return {
        "calibration": [asdict(calibration) for calibration in plan.distillation.calibrations],
        "units": list(fits),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
