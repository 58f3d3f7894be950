"""Every exception RayMerge raises on purpose.

The tree:

    RayMergeError               exit code 1
    |-- UserError               exit code 2: the request is wrong, nothing was started
    |   |-- RecipeError         a key, type, value or setting in a recipe
    |   |-- CheckpointError     a checkpoint that is missing, damaged or unsupported
    |   |-- MismatchError       checkpoints that do not fit each other
    |   |   |-- MissingTensor
    |   |   |-- ShapeMismatch
    |   |   `-- VocabularyMismatch
    |   |-- MemoryBudgetError   the plan does not fit the memory the user allows
    |   `-- OutputError         the output folder is taken, locked or unfinished by another recipe
    |-- NonFiniteTensor         NaN or infinity in an input, found while merging
    |-- LearningError           a fit that does not come to an end
    `-- StorageError            the disk is full, or a file could not be read or written

A message says where, what was found, what was expected and what to do; `nearest` helps with the last.
"""

import difflib
from collections.abc import Iterable


class RayMergeError(Exception):
    """Root of everything RayMerge raises on purpose."""

    exit_code = 1


class UserError(RayMergeError):
    """The request is wrong; nothing was started and nothing was written."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe has an unknown key, a wrong type, or a setting its method does not have."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of a kind RayMerge does not read."""


class MismatchError(UserError):
    """The checkpoints of a recipe do not fit each other."""


class MissingTensor(MismatchError):
    """A tensor of the base is missing in an expert."""


class ShapeMismatch(MismatchError):
    """A tensor has different shapes in two checkpoints."""


class VocabularyMismatch(MismatchError):
    """Embedding rows or token ids differ and the recipe does not say what to do."""


class MemoryBudgetError(UserError):
    """A tensor cannot be merged within the memory the user allows."""


class OutputError(UserError):
    """The output folder is taken, locked, or holds unfinished work of another recipe."""


class NonFiniteTensor(RayMergeError):
    """An input tensor holds NaN or infinity."""


class LearningError(RayMergeError):
    """A fit diverged."""


class StorageError(RayMergeError):
    """A file could not be read or written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the right word."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"it knows {', '.join(words)}" if words else "it has none"
