"""Make the golden tensors: run mergekit on every recipe in `recipes/` and keep what it wrote.

    python3 -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    /tmp/mergekit/bin/python tests/mergekit/make_golden.py [RECIPE ...]

Run once; the tests need neither mergekit nor this script. Each recipe gives one safetensors file in
`golden/`, with mergekit's version, the digest of the inputs, and the written config, vocabulary and
a rendered conversation in its metadata. Methods that draw at random give `golden/random.json`: their statistics
over many seeds (`random_statistics.py`).
"""

import json
import os
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from checkpoints import build_checkpoints, digest, render
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from random_statistics import NUM_SEEDS, RANDOM_RECIPES, describe
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

HERE = Path(__file__).parent.absolute()


def main() -> None:
    wanted = sys.argv[1:]
    # The order of mergekit's set of models, and so of new tokens, hangs on the hash seed.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    keep_first_of_equals()
    # mergekit splits sums over threads; one thread gives the same bits on any machine.
    torch.set_num_threads(1)
    recipes = [path for path in sorted((HERE / "recipes").glob("*.yml")) if not wanted or path.stem in wanted]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        build_checkpoints(Path("."))
        inputs = digest(Path("."))
        for path in recipes:
            keep(path, inputs)
        if not wanted:
            text = json.dumps(
                {"mergekit": version("mergekit"), "inputs": inputs, "seeds": NUM_SEEDS, **random()}, indent=1
            )
            (HERE / "golden" / "random.json").write_text(text + "\n")


def keep_first_of_equals() -> None:
    """Let the sorts that mergekit selects entries by be stable.

    Which of several equal magnitudes mergekit keeps is undefined: its sorts are not stable, and torch's
    order of equals changes with version, CPU and size. The first ones are one of the possible outcomes,
    and the one that RayMerge defines.
    """
    torch.argsort = partial(torch.argsort, stable=True)
    torch.sort = partial(torch.sort, stable=True)
    torch.topk = first_largest


def first_largest(values: Tensor, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """`torch.topk` of a vector, the first of equal entries preferred."""
    found = torch.argsort(values, descending=largest)[:k]
    return values[found], found


def keep(path: Path, inputs: str) -> None:
    """Merge one recipe and keep its tensors and facts."""
    out = Path(f"out-{path.stem}")
    tensors = merge(yaml.safe_load(path.read_text()), out)
    config = json.loads((out / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    facts = {
        "mergekit": version("mergekit"),
        "inputs": inputs,
        "config": {key: config[key] for key in ("num_hidden_layers", "vocab_size", "dtype")},
        "vocabulary": dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])),
        # What the template writes, not its text, which is mergekit's.
        "conversation": render(tokenizer) if tokenizer.chat_template else None,
    }
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    save_file(tensors, HERE / "golden" / f"{path.stem}.safetensors", metadata=metadata)
    print(path.stem, len(tensors), facts["config"], flush=True)


def random() -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over seeds of every statistic of every random recipe."""
    found = {}
    for name, recipe in RANDOM_RECIPES.items():
        runs = [describe(merge(recipe, Path(f"out-{name}-{seed}"), seed), Path(".")) for seed in range(NUM_SEEDS)]
        table = torch.tensor([list(run.values()) for run in runs], dtype=torch.float64)
        found[name] = {
            key: [round(float(column.mean()), 9), round(float(column.std()), 9)]
            for key, column in zip(runs[0], table.unbind(1), strict=True)
        }
        print(name, found[name], flush=True)
    return found


def merge(recipe: dict[str, object], out: Path, seed: int | None = None) -> dict[str, Tensor]:
    options = MergeOptions(quiet=True, random_seed=seed, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options=options)
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


if __name__ == "__main__":
    main()
