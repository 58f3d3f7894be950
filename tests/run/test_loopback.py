"""Ray, started on this machine for a merge, is reached from this machine alone, and by token."""

import os

import pytest
from command import listening


@pytest.mark.usefixtures("ray_session")
def test_nothing_listens_beyond_loopback() -> None:
    import ray

    ray.get(ray.remote(lambda: None).remote())
    found = listening()
    assert found and all(address.startswith("127.") for address in found), found
    assert os.environ["RAY_AUTH_MODE"] == "token"
