"""Hand samples from stage to stage through files below the output folder, which all workers share.

Files outlive the workers: a stage that is started again finds what the one before has left for it.
"""

import time
from collections.abc import Mapping

from torch import Tensor

from raymerge.checkpoint.place import OutputPath, load_tensors
from raymerge.checkpoint.writer import write_tensors
from raymerge.distill.engine import Group
from raymerge.distill.stages import Stage
from raymerge.plan.units import UNITS

# Between two looks for a file that another stage will write.
WAIT_SECONDS = 0.2


class FilePassage:
    """The files of one rank of one stage: one per batch and path."""

    def __init__(self, folder: OutputPath, stage: Stage, group: Group) -> None:
        self._folder = folder / UNITS
        self._stage = stage
        # Which rows a rank has depends on the number of ranks, and which blocks on the number of stages.
        self._rank = f"{group.rank}-of-{group.size}"

    def give(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Hand something on to the next stage."""
        write_tensors(self._path(self._stage.number, key), tensors)

    def take(self, key: str) -> Mapping[str, Tensor]:
        """What the stage before has handed on; waits for it."""
        path = self._path(self._stage.number - 1, key)
        while not path.is_file():
            time.sleep(WAIT_SECONDS)
        return load_tensors(path)

    def _path(self, stage: int, key: str) -> OutputPath:
        return self._folder / f"stage-{stage}-of-{self._stage.count}-rank-{self._rank}-{key}.safetensors"
