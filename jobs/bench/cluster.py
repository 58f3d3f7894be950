"""The same merge and the same distillation with 1, 2 and 4 workers and on two nodes, and what a killed worker costs.

    python jobs/bench/cluster.py FOLDER

FOLDER keeps the checkpoints. Nodes are real raylets on this machine, which has no more cores for two of them than for
one: `bound` is the best speedup that its cores allow. Seconds are of a merge from its first line on, while Ray's
processes still start, and of the fits of a distillation; the cost of a killed worker is of the whole run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from checkpoints import SHAPES, make_checkpoints
from ray.cluster_utils import Cluster
from table import show

from raymerge.checkpoint.index import open_checkpoint

RAYMERGE = [sys.executable, "-m", "raymerge"]
EXPERTS = ("first", "second", "third")
# Workers, and the CPUs of each node.
LAYOUTS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "1 worker": (1, (1,)),
    "2 workers": (2, (2,)),
    "4 workers": (4, (4,)),
    "2 workers on 2 nodes": (2, (1, 1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints are kept and outputs are written")
    parser.add_argument("--size", choices=SHAPES, default="1b", help="of the merge; the distillation's is small")
    parser.add_argument("--epochs", type=int, default=20, help="of the distillation")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    merging, needed = of_merge(folder, arguments.size)
    distilling = of_distillation(folder, arguments.epochs)
    with cluster_of((1,)) as address:
        # So that what follows reads from memory, all of it alike.
        run({**merging, "compute": {"workers": 1}}, folder, address)
    rows: list[dict[str, Any]] = []
    for job, recipe, least in (("merge", merging, needed), ("distillation", distilling, None)):
        alone: float | None = None
        for where, (workers, nodes) in LAYOUTS.items():
            asked = {**recipe, "compute": {"workers": workers, **({"zero_stage": 1} if job == "distillation" else {})}}
            with cluster_of(nodes) as address:
                facts = run(asked, folder, address)
                lost = run(asked, folder, address, kill_after=facts["elapsed_seconds"] / 2)
            seconds = seconds_of(facts)
            alone = alone or seconds
            bound = min(workers, os.cpu_count() or 1)
            read = sum(shard["bytes_read"] for shard in facts["shards"])
            rows.append(
                {
                    "job": job,
                    "where": where,
                    "seconds": seconds,
                    "gb_a_second": read / 1e9 / seconds if least else None,
                    "speedup": alone / seconds,
                    "bound": bound,
                    "efficiency": alone / seconds / bound,
                    "read_of_least": read / least if least else None,
                    "a_killed_worker_s": lost["elapsed_seconds"] - facts["elapsed_seconds"],
                }
            )
            print(rows[-1], file=sys.stderr)
    show(rows, arguments.json)


def of_merge(folder: Path, size: str) -> tuple[dict[str, Any], int]:
    """TIES of three experts, in shards of a tenth of the model, and the bytes of all tensors that go in."""
    places = make_checkpoints(folder / size, SHAPES[size], EXPERTS)
    held = {
        name: sum(entry.num_bytes for _, entry in open_checkpoint(str(place)).tensors.values())
        for name, place in places.items()
    }
    recipe = {
        "base": str(places["base"]),
        "experts": {name: str(places[name]) for name in EXPERTS},
        "method": "ties",
        "output": {"shard_size": held["base"] // 10},
    }
    return recipe, sum(held.values())


def of_distillation(folder: Path, epochs: int) -> dict[str, Any]:
    """ProDistill of three experts of a small decoder."""
    places = make_checkpoints(folder / "small", SHAPES["small"], EXPERTS)
    ids = torch.randint(SHAPES["small"].vocabulary, (64, 64), generator=torch.Generator().manual_seed(0))
    pq.write_table(pa.table({"input_ids": ids.tolist()}), folder / "samples.parquet")
    samples = str(folder / "samples.parquet")
    return {
        "base": str(places["base"]),
        "experts": {name: {"path": str(places[name]), "calibration": samples} for name in EXPERTS},
        "method": "prodistill",
        "settings": {"epochs": epochs, "samples": 64, "max_length": 64, "batch_size": 8},
    }


@contextmanager
def cluster_of(nodes: tuple[int, ...]) -> Iterator[str]:
    """The address of a cluster with nodes of so many CPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": nodes[0], "include_dashboard": False})
    try:
        for cpus in nodes[1:]:
            cluster.add_node(num_cpus=cpus)
        yield cluster.address
    finally:
        cluster.shutdown()


def run(recipe: Mapping[str, Any], folder: Path, address: str, kill_after: float | None = None) -> dict[str, Any]:
    """The facts of a run; so many seconds after its start, or when there is one, a worker is killed, if asked."""
    written, out = folder / "recipe.json", folder / "out"
    written.write_text(json.dumps(recipe))
    environment = {**os.environ, "RAY_ADDRESS": address}
    command = [*RAYMERGE, "merge", str(written), str(out), "--overwrite", "--quiet"]
    process = subprocess.Popen(command, env=environment)
    if kill_after is not None:
        begun = time.monotonic()
        while not (victims := workers_of(recipe["method"])) or time.monotonic() - begun < kill_after:
            if process.poll() is not None:
                raise SystemExit("the run was over before a worker could be killed; give it more to do")
            time.sleep(0.05)
        victims[0].kill()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    found: dict[str, Any] = json.loads((out / "raymerge" / "run.json").read_text())
    return found


def seconds_of(facts: Mapping[str, Any]) -> float:
    """What a run took: its fits, if it has learned."""
    return sum(unit["elapsed_seconds"] for unit in facts.get("units", ())) or facts["elapsed_seconds"]


def workers_of(method: str) -> list[psutil.Process]:
    """The processes of Ray that do the work, by the titles that Ray gives them."""
    title = "RayTrainWorker" if method == "prodistill" else "ray::_call"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if title in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


if __name__ == "__main__":
    main()
