"""The rows of an evaluation task, checked against what the task says."""

from raymerge.learn.rows import Fits, Rows, is_image, is_label, is_text
from raymerge.recipe.schema import Task


def open_rows(task: Task) -> Rows:
    """The data of a task. Raises RecipeError if it cannot be read."""
    return Rows(task.data, f"evaluate.{task.task}")


def check_task(task: Task) -> None:
    """Check that a task's data exists, has rows, and has the columns the task names; no model is loaded.

    Raises RecipeError.
    """
    rows = open_rows(task)
    if task.kind == "perplexity":
        rows.require({task.text: is_text})
    else:
        texts = [name for name in (task.text, task.text_pair) if name is not None]
        wanted: dict[str, Fits] = {task.label: is_label}
        # Whether texts or images are read depends on the model, which is not loaded here.
        if task.text in rows.schema.names:
            wanted.update(dict.fromkeys(texts, is_text))
        elif task.image in rows.schema.names:
            wanted[task.image] = is_image
        else:
            raise rows.error(
                f"has no column {task.text!r} and no column {task.image!r}; it has {', '.join(rows.schema.names)}; "
                f"set text or image to one of them"
            )
        rows.require(wanted)
    rows.require_some()
