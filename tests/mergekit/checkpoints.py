"""Build the tiny Llama checkpoints that golden tensors were made from, bit for bit, on any machine.

Numbers are sums of random integers times powers of two: unlike `torch.randn`, whose logarithms and
cosines depend on the CPU, they are exact everywhere. `digest` says whether they are what they were.

    base math code chat            bf16, one vocabulary; math has norm weights like the base's, the others not
    base32 math32 code32 chat32    the same before rounding, float32
    added                          chat with two more tokens (and rows)
    reordered                      code with its words, and rows, in reverse order, and one word of its own
    wide wide-expert-1 ... -3      one wider block, float32, for methods that draw at random
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama with 4 heads, 2 key-value heads, and an untied output matrix."""

    hidden: int
    intermediate: int
    blocks: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        kv = self.hidden // 2
        block = {
            "input_layernorm.weight": (self.hidden,),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
        }
        blocks = {f"model.layers.{i}.{name}": sides for i in range(self.blocks) for name, sides in block.items()}
        rows = (self.vocabulary, self.hidden)
        return {"lm_head.weight": rows, "model.embed_tokens.weight": rows, "model.norm.weight": (self.hidden,)} | blocks

    def config(self, vocabulary: int, dtype: torch.dtype) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocabulary,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "dtype": str(dtype).removeprefix("torch."),
        }


TINY = Shape(hidden=16, intermediate=24, blocks=4, vocabulary=64)
WIDE = Shape(hidden=64, intermediate=128, blocks=1, vocabulary=256)


def build_checkpoints(folder: Path) -> None:
    """Write every checkpoint below `folder`."""
    words = [*SPECIAL, *(f"w{i}" for i in range(TINY.vocabulary - len(SPECIAL)))]
    family = _family(TINY, ("math", "code", "chat"), seed=1)
    for name, tensors in family.items():
        _save(folder / f"{name}32", tensors, TINY, words)
        _save(folder / name, _cast(tensors), TINY, words, TEMPLATE if name in ("base", "chat") else None)
    _save(folder / "added", _with_rows(_cast(family["chat"]), 2), TINY, [*words, "<|tool|>", "extra"])
    moved = [*range(len(SPECIAL)), *reversed(range(len(SPECIAL), TINY.vocabulary))]
    order = ["own" if words[i] == "w7" else words[i] for i in moved]
    _save(folder / "reordered", _take_rows(_cast(family["code"]), moved), TINY, order)
    wide_words = [*SPECIAL, *(f"w{i}" for i in range(WIDE.vocabulary - len(SPECIAL)))]
    for name, tensors in _family(WIDE, ("expert-1", "expert-2", "expert-3"), seed=2).items():
        _save(folder / ("wide" if name == "base" else f"wide-{name}"), tensors, WIDE, wide_words)


def digest(folder: Path) -> str:
    """SHA-256 of every tensor of every checkpoint below `folder`."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*/model.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            found.update(f"{file.parent.name} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def render(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """A short conversation by the tokenizer's chat template, whole and with an answer still to come."""
    talk = [{"role": "user", "content": "two plus two"}, {"role": "assistant", "content": "four"}]
    return [tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask) for ask in (False, True)]


def _bell(shape: tuple[int, ...], generator: torch.Generator, exponent: int) -> Tensor:
    """Exact numbers with a bell-shaped distribution of standard deviation 1.15 * 2**exponent."""
    drawn = torch.randint(-(1 << 15), 1 << 15, (4, *shape), generator=generator).sum(0)
    return drawn.to(torch.float32) * 2.0 ** (exponent - 15)


def _family(shape: Shape, experts: tuple[str, ...], seed: int) -> dict[str, dict[str, Tensor]]:
    """A base and experts, in float32: weights near 0.036, task vectors near 0.0045."""
    generator = torch.Generator().manual_seed(seed)
    base = {
        name: _bell(sides, generator, -5) + (1.0 if "norm" in name else 0.0) for name, sides in shape.tensors().items()
    }
    family = {"base": base}
    for expert in experts:
        # One expert leaves the norms alone, as many do: task vectors of zero.
        family[expert] = {
            name: value.clone() if expert == "math" and "norm" in name else value + _bell(value.shape, generator, -8)
            for name, value in base.items()
        }
    return family


def _cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def _is_vocabulary(name: str) -> bool:
    return name in ("lm_head.weight", "model.embed_tokens.weight")


def _with_rows(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.cat([t, _bell((count, t.shape[1]), generator, -5).to(t.dtype)]) if _is_vocabulary(name) else t
        for name, t in tensors.items()
    }


def _take_rows(tensors: Mapping[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    return {name: t[order] if _is_vocabulary(name) else t for name, t in tensors.items()}


def _save(
    folder: Path, tensors: Mapping[str, Tensor], shape: Shape, words: list[str], template: str | None = None
) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    rows, dtype = tensors["lm_head.weight"].shape[0], tensors["lm_head.weight"].dtype
    (folder / "config.json").write_text(json.dumps(shape.config(rows, dtype), indent=2))
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    tokenizer.save_pretrained(folder)
