"""Plan a merge of a base and eight experts of 405 B parameters each: seconds, and memory, beside reading alone.

    python jobs/bench/planner.py FOLDER --mergekit /tmp/mergekit/bin/python

FOLDER keeps the checkpoints between runs: whole configs, indexes and headers; the weights are holes in files, which
take no room on disk. Every command runs in a process of its own, start-up included.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from math import prod
from pathlib import Path

import torch
from processes import run_measured
from rich.console import Console
from rich.table import Table

from raymerge.checkpoint.header import build_header

NAMES = ("base", "math", "code", "chat", "law", "medicine", "tools", "vision", "german")
# As they come: some are saved in files of another size than their base, so that their headers differ.
SHARD_BYTES = (5 * 10**9, 4 * 10**9)
RAYMERGE = [sys.executable, "-m", "raymerge", "plan"]
IMPORTS = "its imports alone"
NODES = ["--nodes", "1", "--nodes", "8", "--nodes", "64"]

# What mergekit does before it merges: indexes are read, headers are not.
MERGEKIT = """
import sys, yaml
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
asked = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
options = MergeOptions()
known = get_architecture_info(asked, options)
LoaderCache().setup(options=options)
config = _model_out_config(asked, known)
for model in asked.referenced_models():
    LoaderCache().get(model)
print(len(MergePlanner(asked, known, options=options, out_model_config=config).plan_to_disk("none")))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """A decoder whose blocks hold many small networks: the shape with most tensors for its size."""

    hidden: int
    blocks: int
    networks: int
    inner: int
    vocabulary: int = 151936

    def tensors(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        kv, hidden, inner = 1024, self.hidden, self.inner
        yield "lm_head.weight", torch.bfloat16, (self.vocabulary, hidden)
        yield "model.embed_tokens.weight", torch.bfloat16, (self.vocabulary, hidden)
        for block in range(self.blocks):
            shapes = {"input_layernorm": (hidden,)}
            for number in range(self.networks):
                prefix = f"mlp.experts.{number}"
                shapes[f"{prefix}.down_proj"] = (hidden, inner)
                shapes[f"{prefix}.gate_proj"] = (inner, hidden)
                shapes[f"{prefix}.up_proj"] = (inner, hidden)
            shapes |= {
                "mlp.gate": (self.networks, hidden),
                "post_attention_layernorm": (hidden,),
                "self_attn.k_norm": (128,),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "self_attn.q_norm": (128,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.v_proj": (kv, hidden),
            }
            for name, shape in shapes.items():
                yield f"model.layers.{block}.{name}.weight", torch.bfloat16, shape
        yield "model.norm.weight", torch.bfloat16, (hidden,)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "moe_intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_experts": self.networks,
            "num_experts_per_tok": 8,
            "num_attention_heads": self.hidden // 128,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


SIZES = {
    # 115 000 tensors in the nine checkpoints together, and in each.
    "405b": Mixture(hidden=6144, blocks=64, networks=64, inner=5264),
    "405b-fine": Mixture(hidden=4096, blocks=64, networks=600, inner=848),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints are kept")
    parser.add_argument("--size", choices=SIZES, default="405b")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of these counts")
    parser.add_argument("--mergekit", type=Path, help="the Python of mergekit's own environment")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute() / arguments.size
    shape = SIZES[arguments.size]
    places = [make_checkpoint(folder / name, shape, SHARD_BYTES[number % 2]) for number, name in enumerate(NAMES)]
    files = [file for place in places for file in sorted(place.glob("*.safetensors"))]
    recipe, foreign = folder / "recipe.json", folder / "mergekit.yml"
    experts = {place.name: str(place) for place in places[1:]}
    recipe.write_text(json.dumps({"base": str(places[0]), "experts": experts, "method": arguments.method}))
    models = [{"model": str(place), "parameters": {"weight": 0.3, "density": 0.2}} for place in places[1:]]
    asked = {"merge_method": "ties", "base_model": str(places[0]), "models": models, "dtype": "bfloat16"}
    foreign.write_text(json.dumps(asked))
    commands = {
        "raymerge plan": [*RAYMERGE, str(recipe), *NODES],
        IMPORTS: [sys.executable, "-c", "import raymerge.api, raymerge.cli"],
    }
    if arguments.mergekit is not None:
        commands["mergekit's planner"] = [str(arguments.mergekit), "-c", MERGEKIT, str(foreign)]
    num_tensors = sum(1 for _ in shape.tensors()) * len(NAMES)
    rows: dict[str, tuple[float, float]] = {}
    for name, command in commands.items():
        runs = [run_measured(command) for _ in range(arguments.rounds)]
        rows[name] = (min(run.elapsed_seconds for run in runs), max(run.peak_bytes for run in runs) / 1e9)
    read = [header_seconds(files) for _ in range(arguments.rounds)]
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {date.today().isoformat()}",
        "load": os.getloadavg()[0],
        "num_tensors": num_tensors,
        "num_files": len(files),
        "rows": {name: {"seconds": seconds, "peak_gb": peak} for name, (seconds, peak) in rows.items()},
        "headers_read_and_parsed_seconds": min(read),
    }
    print(json.dumps(facts, indent=2)) if arguments.json else show(facts)


def make_checkpoint(place: Path, shape: Mixture, shard_bytes: int) -> Path:
    """A checkpoint without a byte of weights in it; what is there already is kept."""
    if (place / "config.json").is_file():
        return place
    place.mkdir(parents=True, exist_ok=True)
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, sides in shape.tensors():
        size = prod(sides) * dtype.itemsize
        if filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, dtype, sides))
        filled += size
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        head, entries = build_header(group)
        with (place / file).open("wb") as opened:
            opened.write(head)
            opened.truncate(entries[-1].start + entries[-1].num_bytes)
        weight_map |= {name: file for name, _, _ in group}
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (place / "config.json").write_text(json.dumps(shape.config()))
    return place


def header_seconds(files: list[Path]) -> float:
    """Reading and parsing the JSON of every header: what no planner can do without."""
    begun = time.perf_counter()
    for file in files:
        with file.open("rb") as opened:
            json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return time.perf_counter() - begun


def show(facts: dict[str, object]) -> None:
    num_tensors, rows = facts["num_tensors"], facts["rows"]
    assert isinstance(num_tensors, int) and isinstance(rows, dict)
    table = Table(
        title=f"{facts['machine']}, load {facts['load']:.1f}: {num_tensors} tensors, {facts['num_files']} files"
    )
    for column in ("", "seconds", "peak GB", "tensors a second"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        rate = "" if name == IMPORTS else f"{num_tensors / row['seconds']:.0f}"
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['peak_gb']:.2f}", rate)
    read = facts["headers_read_and_parsed_seconds"]
    assert isinstance(read, float)
    table.add_row("headers read and parsed, alone", f"{read:.1f}", "", f"{num_tensors / read:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
