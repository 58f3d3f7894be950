"""Several real raylets on this machine, one of them killed: merges, distillations and searches end in the same bytes.

Where the network may be divided, tests/run/test_machines.py gives each node an address and a disk of its own.
"""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from command import descendants, raymerge, started, wait
from head import LOOPBACK
from ray.cluster_utils import Cluster
from run.test_resume import SLOW
from run.test_search import PER_EXPERT, family, num_told
from samples import make_family
from tiny import make_llama, recipe, weights

from raymerge import api

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SLEEP = 'time.sleep(0 if Path("fast").exists() else self.seconds)'
WORKER = "RayTrainWorker"
UNITS = "out.partial/raymerge/units"


@pytest.fixture
def cluster(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with one CPU; the test adds nodes. They listen where the Ray of this process does: on loopback."""
    monkeypatch.setenv(LOOPBACK, "0")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield found
    finally:
        found.shutdown()


def raylet_of(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def kill(node: Any) -> None:
    """The raylet and its workers are gone at once, as with a machine that loses power."""
    raylet = psutil.Process(raylet_of(node))
    for one in [*raylet.children(recursive=True), raylet]:
        one.send_signal(signal.SIGKILL)


def run_until(
    asked: Any, place: Path, cluster: Cluster, reached: Callable[[], Any], then: Callable[[Any], None], code: int = 0
) -> None:
    """Run a recipe on the cluster; when something is reached, let something happen; the run ends with this code."""
    verb = "search" if "search" in asked else "merge"
    (place / "recipe.yml").write_text(json.dumps(asked))
    with started(verb, "recipe.yml", "out", cwd=place, RAY_ADDRESS=cluster.address) as process:
        wait(reached, process, seconds=200)
        then(process)
        _, said = process.communicate(timeout=200)
    assert process.returncode == code, said


def of_merge(place: Path, blocks: int = 4, sleep: str = SLEEP) -> dict[str, Any]:
    """A merge of several files that takes its time."""
    (place / "slow_method.py").write_text(SLOW.replace(SLEEP, sleep))
    places = [make_llama(place / name, seed, blocks=blocks) for seed, name in enumerate(("base", "a", "b"))]
    return recipe(*places, method="slow_method:Slow", output={"shard_size": 6000}, settings={"seconds": 1.0})


def test_a_merge_whose_second_node_comes_late_and_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    # Says which node it works on, by its raylet.
    nodes = tmp_path / "nodes"
    asked = of_merge(tmp_path, sleep=f'open("{nodes}", "a").write(f"{{os.getppid()}}\\n"); {SLEEP}')
    added: list[Any] = []

    def begun() -> bool:
        if nodes.is_file() and not added:
            added.append(cluster.add_node(num_cpus=1))
        return bool(added) and str(raylet_of(added[0])) in nodes.read_text().split()

    run_until(asked, tmp_path, cluster, begun, lambda _: kill(added[0]))
    api.merge({**asked, "method": "linear", "settings": {}}, tmp_path / "expected", local=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_a_distillation_that_loses_a_worker_its_driver_and_a_node(cluster: Cluster, tmp_path: Path) -> None:
    """Two workers on two nodes; the group begins anew each time, from the last finished block."""
    second = cluster.add_node(num_cpus=1)
    asked = {**make_family(tmp_path, epochs=30), "compute": {"workers": 2, "zero_stage": 2}}
    first_unit, second_unit = (tmp_path / UNITS / f"encoder.layer.{block}.json" for block in (0, 1))

    def lose_a_worker(process: Any) -> None:
        descendants(raylet_of(cluster.head_node), WORKER)[0].kill()
        wait(second_unit.is_file, process, seconds=200)
        process.kill()

    def lose_a_node(_: Any) -> None:
        cluster.add_node(num_cpus=1)
        kill(second)

    run_until(asked, tmp_path, cluster, first_unit.is_file, lose_a_worker, -signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    run_until(asked, tmp_path, cluster, lambda: descendants(raylet_of(second), WORKER), lose_a_node)
    again = raymerge("merge", "recipe.yml", "expected", cwd=tmp_path, RAY_ADDRESS=cluster.address)
    assert again.returncode == 0, again.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_a_search_that_loses_a_process_a_node_and_its_driver(cluster: Cluster, tmp_path: Path) -> None:
    """It ends with the trials of one that was not disturbed."""
    second = cluster.add_node(num_cpus=1)
    asked = family(tmp_path, space=PER_EXPERT, trials=60, searcher="random", concurrent=2)
    partial = tmp_path / "out.partial"

    def lose_all(process: Any) -> None:
        descendants(raylet_of(cluster.head_node), "ImplicitFunc")[0].kill()
        kill(second)
        wait(lambda: num_told(partial) >= 10, process, seconds=200)
        process.kill()

    run_until(asked, tmp_path, cluster, lambda: num_told(partial) >= 3, lose_all, -signal.SIGKILL)
    assert num_told(partial) < 60 and not (tmp_path / "out").exists()
    for out in ("out", "expected"):
        again = raymerge("search", "recipe.yml", out, cwd=tmp_path, RAY_ADDRESS=cluster.address)
        assert again.returncode == 0, again.stderr
    tables = [pq.read_table(tmp_path / out / "trials.parquet").to_pylist() for out in ("out", "expected")]
    found, expected = ([(r["trial"], r["settings.coefficient[a]"], r["mean_score"]) for r in rows] for rows in tables)
    assert found == expected and len(found) == 60 and not any(row["error"] for row in tables[0])
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_a_merge_that_loses_its_driver(cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    asked = of_merge(tmp_path)

    def begun() -> bool:
        return len(list((tmp_path / "out.partial").glob("*.safetensors"))) >= 2

    run_until(asked, tmp_path, cluster, begun, lambda process: process.kill(), -signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    (tmp_path / "fast").write_text("")
    again = raymerge("merge", "recipe.yml", "out", cwd=tmp_path, RAY_ADDRESS=cluster.address)
    assert again.returncode == 0, again.stderr
    api.merge({**asked, "method": "linear", "settings": {}}, tmp_path / "expected", local=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_a_slow_node(cluster: Cluster, tmp_path: Path) -> None:
    """It is given less to do, and what it does is right."""
    slow, noted = raylet_of(cluster.add_node(num_cpus=1)), tmp_path / "nodes"
    waits = f'open("{noted}", "a").write(f"{{os.getppid()}}\\n"); time.sleep(2 if os.getppid() == {slow} else 0.1)'
    asked = of_merge(tmp_path, blocks=6, sleep=waits)
    run_until(asked, tmp_path, cluster, noted.is_file, lambda _: None)
    merged_by = noted.read_text().split()
    assert 0 < merged_by.count(str(slow)) < len(merged_by) / 4
    api.merge({**asked, "method": "linear", "settings": {}}, tmp_path / "expected", local=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
