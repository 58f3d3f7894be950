"""Ray, started on this machine for a merge, is reached from this machine alone, and by token."""

import os

import psutil
import pytest
from command import descendants


@pytest.mark.usefixtures("ray_session")
def test_nothing_listens_beyond_loopback() -> None:
    import ray

    ray.get(ray.remote(lambda: None).remote())
    family = [psutil.Process(), *descendants(os.getpid())]
    listening = {each.laddr.ip for one in family for each in one.net_connections("tcp") if each.status == "LISTEN"}
    assert listening and all(ip.removeprefix("::ffff:").startswith("127.") for ip in listening), listening
    assert os.environ["RAY_AUTH_MODE"] == "token"
