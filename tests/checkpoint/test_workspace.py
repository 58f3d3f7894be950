"""An output grows beside its place, and nothing is removed that RayMerge did not make."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from raymerge.checkpoint import workspace
from raymerge.checkpoint.workspace import is_whole, open_workspace
from raymerge.errors import OutputError


def finish(out: Path, digest: str, text: str = "x", overwrite: bool = False) -> None:
    with open_workspace(out, digest, overwrite) as found:
        (found.folder / "file").write_text(text)
        found.publish()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_output_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with open_workspace(out, "one", False) as found:
        assert not found.finished
        (found.folder / "model.safetensors").write_bytes(b"12345")
        (found.folder / "left.tmp").write_text("")
        assert is_whole(found.folder / "model.safetensors", 5)
        assert not is_whole(found.folder / "model.safetensors", 6)
        assert not is_whole(found.folder / "other.safetensors", 0)
        assert not out.exists()
        found.publish()
    assert files(out) == ["model.safetensors", "raymerge/plan.sha256"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_unfinished_work_is_found_again(tmp_path: Path) -> None:
    with open_workspace(tmp_path / "out", "one", False) as found:
        (found.folder / "file").write_text("x")
    with open_workspace(tmp_path / "out", "one", False) as found:
        assert (found.folder / "file").read_text() == "x"
    with (
        pytest.raises(OutputError, match="unfinished work of another recipe"),
        open_workspace(tmp_path / "out", "two", False),
    ):
        pass
    assert (tmp_path / "out.partial" / "file").is_file()
    with open_workspace(tmp_path / "out", "two", True) as found:
        assert not (found.folder / "file").exists()


def test_a_finished_output_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "one")
    with open_workspace(out, "one", False) as found:
        assert found.finished and found.folder == out
    with (
        pytest.raises(OutputError, match="exists and is not the result of this recipe"),
        open_workspace(out, "two", False),
    ):
        pass
    assert (out / "file").read_text() == "x"
    finish(out, "two", "y", overwrite=True)
    assert (out / "file").read_text() == "y"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_wrote_is_never_removed(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="exists and"), open_workspace(out, "one", overwrite):
        pass
    assert files(out) == ["thesis.tex"]
    shutil.rmtree(out)
    partial = tmp_path / "out.partial"
    partial.mkdir(exist_ok=True)
    (partial / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputError, match="holds thesis.tex, which RayMerge did not write"),
        open_workspace(out, "one", overwrite),
    ):
        pass
    assert "thesis.tex" in files(partial)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="exists and is not"), open_workspace(tmp_path / "out", "one", False):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), open_workspace(tmp_path / "file" / "out", "one", False):
        pass


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    finish(tmp_path / "out", "one")
    assert (tmp_path / "out" / "file").is_file()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with (
        open_workspace(tmp_path / "out", "one", False),
        pytest.raises(OutputError, match="another process is writing it"),
        open_workspace(tmp_path / "out", "one", True),
    ):
        pass


def test_an_output_put_in_place_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes begin at once; the other is done between our look at OUT and our lock."""
    out = tmp_path / "out"
    lock = fcntl.flock

    def late(handle: int, how: int) -> None:
        monkeypatch.setattr(workspace.fcntl, "flock", lock)
        finish(tmp_path / "other", "theirs", "their work")
        os.rename(tmp_path / "other", out)
        lock(handle, how)

    monkeypatch.setattr(workspace.fcntl, "flock", late)
    with pytest.raises(OutputError, match="exists and is not the result"), open_workspace(out, "ours", False):
        pass
    assert (out / "file").read_text() == "their work"
