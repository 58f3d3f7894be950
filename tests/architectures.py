"""Tiny random models of many families, as transformers saves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
IMAGE: dict[str, Any] = {**TEXT, "image_size": 8, "patch_size": 4, "num_channels": 1}

# Family: the class that is saved, and what its config is made of.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("BertForSequenceClassification", TEXT),
    "roberta": ("RobertaForSequenceClassification", {**TEXT, "pad_token_id": 1}),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {
            **TEXT,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "pos_att_type": ["p2c", "c2p"],
        },
    ),
    "vit": ("ViTForImageClassification", IMAGE),
    "clip_vision_model": ("CLIPVisionModel", {**IMAGE, "num_channels": 3}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 48, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "llama": ("LlamaForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", DECODER),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {**DECODER, "sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    ),
    "phi3": ("Phi3ForCausalLM", {**TEXT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 48,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 3,
            "num_heads": 2,
            "pad_token_id": 0,
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": 0,
        },
    ),
}


def make(family: str, seed: int = 0) -> Any:
    """A model with random weights, in eval mode; experts of one family are a base of seed 0, moved a little."""
    architecture, content = FAMILIES[family]
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**content)).eval()
    # Weights that transformers sets to 0 or 1 at the start would hide mistakes.
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
        moved = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter += (0.02 if seed else 0) * torch.randn(parameter.shape, generator=moved)
    return model


def save(family: str, folder: Path, seed: int = 0) -> Path:
    make(family, seed).save_pretrained(folder)
    return folder


def inputs_of(family: str, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of the family's inputs; texts are padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    if family in ("vit", "clip_vision_model"):
        channels = FAMILIES[family][1]["num_channels"]
        return {"pixel_values": torch.randn(rows, channels, 8, 8, generator=generator)}
    ids = torch.randint(5, 48, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[mask == 0] = 0 if family != "roberta" else 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return inputs
