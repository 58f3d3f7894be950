"""What tests of object storage share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from storage import Storage, serve

from raymerge.checkpoint import remote


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Storage]:
    """A server for this test, with short pauses between attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    with serve(monkeypatch) as found:
        yield found
