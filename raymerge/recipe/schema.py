"""The recipe, as a user writes it in YAML. Unknown keys and wrong types are refused."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
)
from pydantic_core import PydanticCustomError

from raymerge.checkpoint.remote import NO_CREDENTIALS, has_credentials

# A setting: a number, flag or word; a list of them (a gradient over depth); or filtered values.
Scalar = StrictBool | StrictInt | StrictFloat | str


class Part(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Filtered(Part):
    """A value for the tensors whose name contains `filter` (`*` or nothing: for all)."""

    value: Scalar | list[Scalar]
    filter: str | None = None


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


Setting = Annotated[Scalar | list[Scalar] | list[Filtered], BeforeValidator(_one_as_list)]
Settings = dict[str, Setting]


def _without_secrets(place: str) -> str:
    if has_credentials(place):
        raise PydanticCustomError(SECRET, NO_CREDENTIALS)
    return place


# The kind of an error whose message must not show what was found.
SECRET = "secret"

Place = Annotated[str, AfterValidator(_without_secrets)]
"""A folder, a file, a hub id, or what lies on object storage."""


def _path_as_expert(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Expert(Part):
    """A fine-tuned checkpoint."""

    path: Place = Field(description="a folder, hub id[@revision], s3:// or gs://")
    calibration: Place | None = Field(
        default=None, description="unlabelled rows for methods that learn: a parquet or jsonl file, or a folder of them"
    )
    settings: Settings = Field(default_factory=dict, description="settings for this expert alone")


def _range_as_source(value: Any) -> Any:
    return {"blocks": value} if isinstance(value, list | tuple) else value


class Source(Part):
    """A run of blocks of one model: [first, last) counted from 0."""

    blocks: tuple[int, int]
    settings: Settings = Field(default_factory=dict)


class Slice(Part):
    """A run of blocks of the output; sources are named as experts, or `base`."""

    sources: dict[str, Annotated[Source, BeforeValidator(_range_as_source)]] = Field(min_length=1)
    settings: Settings = Field(default_factory=dict)


class TokenSource(Part):
    """Where the embedding row of one token comes from: a model, a token of a model, or zeros."""

    model: str | None = Field(default=None, description="an expert's name, or base; none gives zeros")
    token: str | None = Field(default=None, description="another token of that model")
    token_id: int | None = None
    force: bool = Field(default=False, description="give every model this row, not only those without the token")


class Output(Part):
    """What is written."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="dtype of the merged tensors; none keeps the stored dtype"
    )
    shard_size: str | int = Field(default="auto", description="largest file, in bytes or as 5GB; auto: 32 files")
    tokenizer: str | None = Field(default=None, description="base, union, or an expert's name")
    tokens: dict[str, TokenSource] = Field(default_factory=dict, description="embedding rows chosen by hand")
    pad_to_multiple_of: int | None = Field(default=None, gt=0, description="rows of embeddings, rounded up")
    chat_template: str | None = Field(
        default=None,
        description="auto, a model's name (or base), a template's name, or Jinja text; none copies",
    )
    heads: list[str] = Field(default_factory=list, description="modules kept per expert though they would fit")
    coefficients: bool = Field(default=False, description="write learned coefficients, one model's size per expert")
    tensorboard: bool = Field(default=False, description="write losses as TensorBoard event files too, as they come")
    missing: Literal["error", "base", "skip"] = Field(
        default="error",
        description="a tensor an expert does not have: refuse, take the base's, or merge without the expert",
    )


class Compute(Part):
    """How much of the machine or cluster is used."""

    workers: int | None = Field(default=None, gt=0, description="tasks at once; none: as many as fit")
    gpus_per_worker: float = Field(default=0, ge=0)
    cpus_per_worker: float = Field(default=1, gt=0, description="of each worker that learns, and its threads")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=0, description="what DeepSpeed shards of what is learned")
    stages: int = Field(
        default=1, gt=0, description="groups the workers are split into, each with its own run of blocks to learn"
    )
    offload: bool = Field(default=False, description="optimizer state in CPU memory")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="in which blocks are run to learn")
    memory: str | int | None = Field(default=None, description="memory per worker, as 2GB; none: as needed")


class Task(Part):
    """An evaluation."""

    task: str
    kind: Literal["classification", "perplexity"]
    data: Place = Field(description="a parquet or jsonl file")
    expert: str | None = Field(
        default=None, description="the expert whose own score is the reference and whose head is used"
    )
    metric: Literal["accuracy", "f1", "matthews"] = "accuracy"
    text: str = "text"
    text_pair: str | None = None
    image: str = "image"
    label: str = "label"
    max_length: int = Field(default=128, gt=1)
    batch_size: int = Field(default=32, gt=0)
    limit: int | None = Field(default=None, gt=0, description="only the first rows")


class Range(Part):
    """What a place of the recipe may hold in a search: numbers from `low` to `high`, or one of `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = Field(default=False, description="as likely between 0.01 and 0.1 as between 0.1 and 1")
    step: float | None = Field(default=None, gt=0, description="only low, low + step, ...; a grid needs it")
    choices: list[Scalar] | None = Field(default=None, min_length=1)
    per: Literal["expert"] | None = Field(default=None, description="a number for each expert")
    knots: int = Field(default=1, gt=0, description="numbers along the depth, a gradient between them")
    filters: list[str] = Field(default_factory=list, description="a number for tensors named so, one for the others")


class Layers(Part):
    """A search for the order of blocks, of passthrough: all experts' blocks in a row, kept or left out."""

    repeats: int = Field(default=1, gt=0, description="how often the row of all blocks is laid")
    scale: Range | None = Field(default=None, description="of what blocks add after a hop to another expert")
    scaled: list[str] = Field(
        default_factory=lambda: ["o_proj", "down_proj"], description="parts of the names of what adds to the stream"
    )


Objective = Literal["mean_score", "worst_share_kept", "weighted_score", "perplexity", "entropy", "agreement"]


class Search(Part):
    """What is searched, how, and on what."""

    trials: int = Field(default=32, gt=0, description="how many; a grid has as many as it has points")
    searcher: Literal["tpe", "random", "grid", "cmaes", "nsga2"] = "tpe"
    space: dict[str, Range] = Field(
        default_factory=dict, description="settings.NAME, METHOD.settings.NAME or method; none: what the method has"
    )
    layers: Layers | None = Field(default=None, description="instead of a space: which blocks stand where")
    objective: Annotated[
        list[Objective], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = Field(default=["mean_score"], min_length=1, description="several give a Pareto set, with nsga2")
    weights: dict[str, float] = Field(default_factory=dict, description="of tasks, for weighted_score")
    evaluate: list[Task] = Field(default_factory=list, description="tasks on validation data, never the test data")
    stop_early: bool = Field(default=False, description="ASHA: bad trials end after a part of the rows")
    concurrent: int | None = Field(default=None, gt=0, description="trials at once; none: as many as there are CPUs")
    cpus_per_trial: float = Field(default=1, gt=0)

    @property
    def lower(self) -> tuple[bool, ...]:
        """For each objective, whether lower is better."""
        return tuple(name in ("perplexity", "entropy") for name in self.objective)


class Recipe(Part):
    """What the user wants."""

    base: Place | None = None
    experts: dict[str, Annotated[Expert, BeforeValidator(_path_as_expert)]] = Field(min_length=1)
    method: str
    settings: Settings = Field(default_factory=dict)
    slices: list[Slice] | None = Field(default=None, min_length=1)
    arithmetic: Literal["float32", "bfloat16", "float16", "stored"] = "float32"
    output: Output = Output()
    compute: Compute = Compute()
    evaluate: list[Task] = Field(default_factory=list)
    search: Search | None = None
    seed: int = 0

    _notes: tuple[str, ...] = PrivateAttr(default=())
    _required: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of another recipe format translated or left out, for the plan to print."""
        return self._notes

    @property
    def required(self) -> tuple[str, ...]:
        """Settings without a default in the recipe's own format."""
        return self._required

    @property
    def foreign(self) -> bool:
        """Read from another toolkit's format, whose conventions it follows."""
        return bool(self._notes)

    def with_compute(self, **changes: Any) -> "Recipe":
        """The same recipe with other entries of `compute`; those given as None stay."""
        given = {name: value for name, value in changes.items() if value is not None}
        copy = self.model_copy(update={"compute": self.compute.model_copy(update=given)})
        return copy.annotated(self._notes, self._required)

    def anchored(self) -> "Recipe":
        """The same recipe with absolute paths, for workers that stand in other folders."""
        experts = {
            name: expert.model_copy(
                update={"path": absolute_folder(expert.path), "calibration": _absolute(expert.calibration)}
            )
            for name, expert in self.experts.items()
        }
        changes: dict[str, Any] = {"experts": experts, "evaluate": [_anchored(task) for task in self.evaluate]}
        if self.base is not None:
            changes["base"] = absolute_folder(self.base)
        if self.search is not None:
            tasks = [_anchored(task) for task in self.search.evaluate]
            changes["search"] = self.search.model_copy(update={"evaluate": tasks})
        return self.model_copy(update=changes).annotated(self._notes, self._required)

    def as_written(self) -> dict[str, Any]:
        """The recipe as plain data, without what was left at its default."""
        return self.model_dump(exclude_defaults=True, mode="json")

    def annotated(self, notes: tuple[str, ...], required: tuple[str, ...]) -> "Recipe":
        """The same recipe with `notes` and `required` set."""
        copy = self.model_copy()
        copy._notes, copy._required = notes, required
        return copy


def _absolute(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).expanduser().absolute())


def absolute_folder(place: str) -> str:
    """A folder's absolute path; what is no folder is a hub id, and stays."""
    return str(_absolute(place)) if Path(place).expanduser().is_dir() else place


def _anchored(task: Task) -> Task:
    return task.model_copy(update={"data": _absolute(task.data)})
