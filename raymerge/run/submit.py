"""A command of ours as a Ray job on a remote cluster: checked, packed, sent, followed.

A job gets this version of RayMerge, the recipe, and the files that the recipe names by relative paths; checkpoints and
outputs lie where every node reaches them. Nothing of this machine's environment goes along, for the dashboard shows
what a job is given: credentials of object storage and of the hub are the cluster's own. Ray's client sends the
cluster's token by itself (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token).
"""

import asyncio
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import raymerge
from raymerge.checkpoint.place import RemotePath, output_path
from raymerge.checkpoint.remote import NO_CREDENTIALS, has_credentials, is_remote
from raymerge.errors import RayMergeError, RecipeError, UserError
from raymerge.recipe.load import load_recipe
from raymerge.recipe.schema import Recipe
from raymerge.recipe.space import candidates

# Ray keeps what is sent in the memory of the head, and refuses a package of 500 MiB.
MOST_BYTES = 400 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job on the cluster whose dashboard is at `address`."""

    id: str
    address: str
    client: Any

    def follow(self, show: Callable[[str], None]) -> int:
        """Show the job's log from its beginning, as it comes; returns the job's exit code.

        Raises RayMergeError if the job was stopped or lost, or the cluster was.
        """

        async def tail() -> None:
            async for lines in self.client.tail_job_logs(self.id):
                show(lines)

        with _named(self.address, f"lost sight of {self.id}, which may go on\n{self.hint}"):
            asyncio.run(tail())
            found = self.client.get_job_info(self.id)
            if not found.status.is_terminal():
                raise RuntimeError("its log ended before it did")
        if found.driver_exit_code is None:
            raise RayMergeError(f"{self.id}: {found.message}")
        code: int = found.driver_exit_code
        # As a shell counts a command that a signal has ended.
        return code if code >= 0 else 128 - code

    @property
    def hint(self) -> str:
        """How to follow and how to stop it."""
        return (
            f"follow it: ray job logs {self.id} --follow --address {self.address}\n"
            f"stop it: ray job stop {self.id} --address {self.address}"
        )


def submit(address: str, verb: str, arguments: Sequence[str], given: Mapping[str, Any]) -> Job:
    """Start `raymerge VERB ARGUMENTS` on a cluster; `given` is what the verb makes of them (`recipe`, `out`, `model`).

    Raises UserError before anything is sent; RayMergeError if the cluster cannot be reached, or refuses.
    """
    out, model, recipe = (given.get(name) for name in ("out", "model", "recipe"))
    if out is not None and not isinstance(output_path(out), RemotePath) and not Path(out).is_absolute():
        raise UserError(
            f"{out}: would lie in the folder of the job; give an absolute path that all nodes share, or s3://"
        )
    if model is not None:
        _check_place(model, "MODEL")
    # Tables as wide as where they are read.
    runtime_env: dict[str, Any] = {"env_vars": {"COLUMNS": str(shutil.get_terminal_size().columns)}}
    runtime_env |= {"py_modules": list(raymerge.__path__), "excludes": ["__pycache__"]}
    with TemporaryDirectory() as folder:
        if recipe is not None:
            pack(Path(recipe), Path(folder))
            runtime_env["working_dir"] = folder
            arguments = [Path(recipe).name if argument == recipe else argument for argument in arguments]
        client = _connect(address)
        command = shlex.join(["python", "-m", "raymerge", verb, *arguments])
        with _named(address, "the job was not accepted"):
            return Job(
                id=client.submit_job(entrypoint=command, runtime_env=runtime_env), address=address, client=client
            )


def pack(recipe: Path, folder: Path) -> None:
    """Copy a recipe into a job's folder, and what it names by relative paths to the same paths below.

    Raises RecipeError: for what `load_recipe` does, for checkpoints that only this machine has, for too much data.
    """
    loaded = load_recipe(recipe)
    if loaded.base is not None:
        _check_place(loaded.base, f"{recipe}: base")
    for name, expert in loaded.experts.items():
        _check_place(expert.path, f"{recipe}: experts.{name}")
    shutil.copy(recipe, folder / recipe.name)
    for name in _files(loaded):
        if ".." in Path(name).parts:
            raise RecipeError(f"{recipe}: {name} is not below this folder; start from one that holds it")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(name).is_dir():
            shutil.copytree(name, target, dirs_exist_ok=True)
        else:
            shutil.copy(name, target)
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    if size > MOST_BYTES:
        raise RecipeError(
            f"{recipe}: its files hold {size / 1e9:.2f} GB, a job may bring {MOST_BYTES / 1e9:.2f} GB; put data on "
            "storage that all nodes share, and name it by absolute paths"
        )


def _check_place(place: str, where: str) -> None:
    """Refuse a checkpoint by a path that means nothing on another machine; what is no folder here is a hub id.

    Refuse one with credentials too: the dashboard shows what a job is given.
    """
    if has_credentials(place):
        raise RecipeError(f"{where}: {NO_CREDENTIALS}")
    path = Path(place)
    if not is_remote(place) and not path.is_absolute() and (path.is_dir() or place.startswith((".", "~"))):
        raise RecipeError(
            f"{where}: {place} is a folder of this machine; give an absolute path that all nodes share, a hub id, "
            "or s3://"
        )


def _files(recipe: Recipe) -> list[str]:
    """The relative paths of data, and of private methods' modules, that are here."""
    tasks = [*recipe.evaluate, *(recipe.search.evaluate if recipe.search is not None else [])]
    named = [task.data for task in tasks]
    named += [expert.calibration for expert in recipe.experts.values() if expert.calibration is not None]
    methods = [recipe.method, *(candidates(recipe) if recipe.search is not None else ())]
    for module in [method.partition(":")[0].partition(".")[0] for method in methods if ":" in method]:
        named += [module, f"{module}.py"]
    return [name for name in dict.fromkeys(named) if not Path(name).is_absolute() and Path(name).exists()]


def _connect(address: str) -> Any:
    """A client of the job server at a dashboard's address."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address: found {address!r}; a dashboard's is expected, as http://HEAD:8265")
    from ray.job_submission import JobSubmissionClient

    for talkative in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{talkative}").setLevel(logging.WARNING)
    # Ray obeys this variable, or RAY_ADDRESS, before it looks at the address it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    with _named(address, "no dashboard of Ray; is it the head's address, and is ray[default] installed there?"):
        return JobSubmissionClient(address)


@contextmanager
def _named(address: str, what: str) -> Iterator[None]:
    """Give what goes wrong between here and a cluster a name."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as problem:
        raise RayMergeError(
            f"{address}: {problem.message.splitlines()[0]}; set RAY_AUTH_MODE=token, and give the cluster's token in "
            "RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
        ) from None
    except (OSError, RuntimeError, ValueError, ClientError) as problem:
        raise RayMergeError(f"{address}: {what}\n{problem}") from None
