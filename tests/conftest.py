"""What all tests share: one Ray for the whole test process."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once on this machine with two cores, and stopped when the tests are done."""
    import ray

    from raymerge.run.cluster import connect

    connect()
    yield
    ray.shutdown()
