"""The rules of the house: floors, the cheap front door, docstrings, words, and a catalogue that is whole."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from raymerge import methods

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raymerge"

FLOORS = {
    "cli": 8,
    "demo": 7,
    "api": 6,
    "run": 5,
    "evaluate": 5,
    "report": 5,
    "plan": 4,
    "recipe": 3,
    "methods": 3,
    "distill": 2,
    "learn": 2,
    "models": 1,
    "ops": 0,
    "checkpoint": 0,
}
# recipe reads the settings of methods, which know nothing of recipes.
# distill follows the samples that learn reads; learn knows nothing of blocks.
SAME_FLOOR = {("recipe", "methods"), ("distill", "learn")}
ONLY_IN = {"transformers": "models", "ray": "run", "deepspeed": "run"}
FAMILIES = ("llama", "bert", "vit", "gpt", "mistral", "mixtral", "qwen", "gemma", "t5", "roberta", "deberta", "phi")

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Every module a file imports, anywhere in it but for type checkers alone, with the line."""
    found = []
    tree = ast.parse(path.read_text())
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {inner for block in guarded for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=short)
def test_a_room_imports_only_from_below(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__", "errors"):
        return
    for name, line in imports_of(path):
        parts = name.split(".")
        if parts[0] != "raymerge" or len(parts) < 2 or parts[1] in ("errors", "__version__", room):
            continue
        assert (room, parts[1]) in SAME_FLOOR or FLOORS[parts[1]] < FLOORS[room], f"{short(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_heavy_libraries_stay_in_their_room(path: Path) -> None:
    for name, line in imports_of(path):
        top = name.split(".")[0]
        if top in ONLY_IN:
            assert room_of(path) == ONLY_IN[top], f"{short(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_families_are_named_only_in_models(path: Path) -> None:
    if room_of(path) == "models":
        return
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for name in names:
        assert not any(name.lower().startswith(family) for family in FAMILIES), f"{short(path)} names {name}"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "jobs").rglob("*.py"))], ids=short)
def test_every_module_says_what_it_does(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{short(path)} has no docstring"
    assert text.partition("\n\n")[0].rstrip().endswith((".", ":")), f"{short(path)}: the first lines are no sentence"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_no_room_for_odds_and_ends(path: Path) -> None:
    assert path.stem not in ("utils", "common", "helpers") and "manager" not in path.stem
    if path.name == "__init__.py" and path.parent != PACKAGE and path.parent.name != "methods":
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, f"{short(path)} holds more than a docstring"


def test_scripts_of_jobs_are_short() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, short(path)


def test_the_front_door_is_cheap() -> None:
    code = "import sys, raymerge; print([m for m in ('ray', 'deepspeed', 'transformers', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_front_door_is_sorted_and_opens() -> None:
    import raymerge

    assert raymerge.__all__ == sorted(raymerge.__all__)
    for name in raymerge.__all__:
        assert getattr(raymerge, name) is not None


@pytest.mark.parametrize("name", methods.CATALOGUE)
def test_the_catalogue_is_whole(name: str) -> None:
    method = methods.find(name)
    module = sys.modules[method.__module__]
    assert method.__doc__ and module.__doc__
    for setting, _, text in methods.describe(method):
        assert text, f"{name}.{setting} has no docstring"
    stem = method.__module__.rpartition(".")[2]
    tests = [path.stem for path in (ROOT / "tests" / "methods").glob("test_*.py")]
    assert f"test_{stem}" in tests, f"{name} has no test file tests/methods/test_{stem}.py"


def test_every_method_file_is_in_the_catalogue() -> None:
    listed = {target.partition(":")[0] for target in methods.CATALOGUE.values()}
    files = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__", "base", "sparse"}
    assert files == listed


def test_the_readme_lists_every_method() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in methods.CATALOGUE:
        assert f"`{name}`" in readme, f"README.md does not list {name}"
