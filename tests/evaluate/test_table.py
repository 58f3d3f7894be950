"""Metrics and the table of what a merge kept."""

import io
import json
import math

import pytest
from rich.console import Console

from raymerge.evaluate.measure import Score
from raymerge.evaluate.metrics import perplexity, score_classes, share_kept
from raymerge.evaluate.table import collect


def score(task: str, value: float, metric: str = "accuracy") -> Score:
    return Score(task=task, metric=metric, score=value, num_rows=10, elapsed_seconds=0.1)


def test_worked_examples_of_metrics() -> None:
    labels, predictions = [0, 0, 1, 1], [0, 1, 1, 1]
    assert score_classes("accuracy", labels, predictions) == 0.75
    # Class 0: precision 1, recall 1/2, F1 2/3; class 1: precision 2/3, recall 1, F1 4/5.
    assert score_classes("f1", labels, predictions) == pytest.approx((2 / 3 + 4 / 5) / 2)
    # (TP TN - FP FN) / sqrt(...) = (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1)
    assert score_classes("matthews", labels, predictions) == pytest.approx(2 / math.sqrt(12))


def test_perplexity_of_a_uniform_guess() -> None:
    assert perplexity(7 * math.log(32), 7) == pytest.approx(32)
    assert perplexity(1e6, 1) == math.inf


def test_share_kept() -> None:
    assert share_kept("accuracy", 0.45, 0.9) == pytest.approx(0.5)
    assert share_kept("perplexity", 20.0, 10.0) == pytest.approx(0.5)
    assert share_kept("accuracy", 0.45, None) is None
    assert share_kept("matthews", 0.3, 0.0) is None


def test_json_is_as_designed() -> None:
    found = collect(
        [score("trec", 0.8), score("gsm8k", 6.0, "perplexity"), score("new", 0.2)], {"trec": 1.0, "gsm8k": 3.0}
    )
    assert json.loads(found.to_json()) == {
        "tasks": {
            "trec": {"score": 0.8, "metric": "accuracy", "share_kept": 0.8},
            "gsm8k": {"score": 6.0, "metric": "perplexity", "share_kept": 0.5},
            "new": {"score": 0.2, "metric": "accuracy", "share_kept": None},
        },
        "mean": pytest.approx(7 / 3),
    }
    assert list(found.tasks) == ["trec", "gsm8k", "new"]


def test_table_has_what_it_needs() -> None:
    text = io.StringIO()
    Console(file=text, width=100).print(collect([score("trec", 0.8), score("new", 0.2)], {"trec": 1.0}).to_table())
    for part in ("trec", "accuracy", "0.8000", "1.0000", "80.0%", "new", "mean", "0.5000"):
        assert part in text.getvalue()
