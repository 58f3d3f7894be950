"""Tiny checkpoints made from seeds in a few milliseconds: plain safetensors, config.json, a WordLevel tokenizer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MARKS = {"unk": "unk", "bos": "s", "eos": "/s"}
SPECIAL = ("<unk>", "<s>", "</s>")


def words(count: int) -> list[str]:
    return [*SPECIAL, *(f"w{i}" for i in range(count - len(SPECIAL)))]


def make_llama(
    folder: Path,
    seed: int = 0,
    *,
    base_seed: int = 0,
    hidden: int = 16,
    blocks: int = 2,
    rows: int = 32,
    tokens: Sequence[str] | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    files: int = 1,
    extra: Mapping[str, Tensor] | None = None,
    drop: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A LlamaForCausalLM: numbers of `base_seed`, moved a little by `seed` (0: not moved)."""
    tokens = words(rows) if tokens is None else tokens
    kv = hidden // 2
    block = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, 2 * hidden),
        "mlp.gate_proj.weight": (2 * hidden, hidden),
        "mlp.up_proj.weight": (2 * hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
    }
    shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
    if not tied:
        shapes["lm_head.weight"] = (rows, hidden)
    tensors = {name: value.to(dtype) for name, value in numbers(shapes, seed, base_seed).items() if name not in drop}
    return save(
        folder,
        {**tensors, **(extra or {})},
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": rows,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": str(dtype).removeprefix("torch."),
            **(config or {}),
        },
        tokens=tokens,
        files=files,
    )


def make_bert(
    folder: Path,
    seed: int = 0,
    *,
    with_head: int | None = None,
    hidden: int = 16,
    blocks: int = 2,
    rows: int = 32,
    drop: Sequence[str] = (),
) -> Path:
    """A headless BertModel, or with `with_head` labels a BertForSequenceClassification (names start with `bert.`)."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (rows, hidden),
        "embeddings.position_embeddings.weight": (24, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    norms = ["embeddings.LayerNorm"]
    dense = {"pooler.dense": (hidden, hidden)}
    for i in range(blocks):
        layer = f"encoder.layer.{i}"
        dense |= {f"{layer}.attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        dense[f"{layer}.attention.output.dense"] = (hidden, hidden)
        dense[f"{layer}.intermediate.dense"] = (2 * hidden, hidden)
        dense[f"{layer}.output.dense"] = (hidden, 2 * hidden)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    tensors = numbers(shapes, seed, 0)
    if with_head is not None:
        tensors = {f"bert.{name}": value for name, value in tensors.items()}
        head = {"classifier.weight": (with_head, hidden), "classifier.bias": (with_head,)}
        tensors |= numbers(head, seed, 100 + seed)
    return save(
        folder,
        {name: value for name, value in tensors.items() if name not in drop},
        {
            "architectures": ["BertModel" if with_head is None else "BertForSequenceClassification"],
            "model_type": "bert",
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": blocks,
            "num_attention_heads": 2,
            "vocab_size": rows,
            "max_position_embeddings": 24,
            "type_vocab_size": 2,
            "pad_token_id": 0,
            **({} if with_head is None else {"id2label": {str(i): f"LABEL_{i}" for i in range(with_head)}}),
        },
        tokens=words(rows),
    )


def numbers(shapes: Mapping[str, tuple[int, ...]], seed: int, base_seed: int) -> dict[str, Tensor]:
    """Bell-shaped numbers of `base_seed`, with a smaller task vector of `seed` on top unless it is 0."""
    found = {}
    first = torch.Generator().manual_seed(1000 + base_seed)
    second = torch.Generator().manual_seed(2000 + seed)
    for name, shape in shapes.items():
        found[name] = torch.randn(shape, generator=first) * 0.1
        delta = torch.randn(shape, generator=second) * 0.02
        if seed:
            found[name] = found[name] + delta
    return found


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    tokens: Sequence[str] | None = None,
    files: int = 1,
) -> Path:
    """Write a checkpoint by the safetensors library, in `files` files."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: value.contiguous() for name, value in tensors.items()}
    if files == 1:
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        names = list(held)
        for i in range(files):
            file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
            part = names[i::files]
            save_file({name: held[name] for name in part}, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        total = sum(value.nbytes for value in held.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "none"}))
    if tokens is not None:
        save_tokenizer(folder, {token: i for i, token in enumerate(tokens)})
    return folder


def save_tokenizer(folder: Path, ids: Mapping[str, int], added: Sequence[str] = ()) -> None:
    """A WordLevel tokenizer; `added` tokens get the ids after the largest."""
    first = max(ids.values()) + 1
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[t], "content": t, "special": True, **entry} for t in SPECIAL if t in ids]
        + [{"id": first + i, "content": t, "special": False, **entry} for i, t in enumerate(added)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": dict(ids), "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file below a folder, by path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


def recipe(base: Path | None, *experts: Path, method: str = "linear", **more: Any) -> dict[str, Any]:
    """A recipe whose experts are named as their folders."""
    found: dict[str, Any] = {} if base is None else {"base": str(base)}
    return {**found, "experts": {path.name: str(path) for path in experts}, "method": method, **more}
