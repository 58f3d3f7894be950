"""Make decoder checkpoints to measure on: a base and experts that differ from it by small random task vectors."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama-shaped decoder with an untied output matrix and heads of 64."""

    hidden: int
    blocks: int
    intermediate: int
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        kv = max(64, self.hidden // 4)
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for block in range(self.blocks):
            prefix = f"model.layers.{block}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": max(1, self.hidden // 256),
            "head_dim": 64,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "1b": Shape(hidden=2048, blocks=22, intermediate=5632, vocabulary=32000),
    "430m": Shape(hidden=1024, blocks=24, intermediate=4096, vocabulary=32000),
    "small": Shape(hidden=256, blocks=2, intermediate=512, vocabulary=1000),
}


def make_checkpoints(folder: Path, shape: Shape, experts: tuple[str, ...]) -> dict[str, Path]:
    """A bf16 `base` and experts below `folder`, two files each; what is there already is kept."""
    places = {name: folder / name for name in ("base", *experts)}
    if all((place / "config.json").is_file() for place in places.values()):
        return places
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(sides, generator=generator) * 0.02 for name, sides in shape.tensors()}
    for name, place in places.items():
        spread = 0.0 if name == "base" else 0.002
        tensors = {
            key: (value + spread * torch.randn(value.shape, generator=generator)).to(torch.bfloat16)
            for key, value in base.items()
        }
        _save(place, tensors, shape)
    return places


def _save(place: Path, tensors: dict[str, torch.Tensor], shape: Shape) -> None:
    place.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, place / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "config.json").write_text(json.dumps(shape.config()))
