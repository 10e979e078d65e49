"""GGUF files compute what Transformers recorded: the recorded folders, written as llama.cpp's converter writes such models.

The mapping of names, the permuted rows of llama's q and k, the 1 that is added to gemma's norms and `rope_freqs` are those of
llama.cpp (convert_hf_to_gguf.py: `permute`, `Gemma3Model.modify_tensors`, `LlamaModel.generate_extra_tensors`), written anew here
and shared with nothing in Shoal, so that a mistake in the importer cannot hide in its own mirror image.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from shoal.model.gguf import import_gguf

CASES = {
    "llama": "llama",
    "llama-linear-rope": "llama",
    "llama3-rope": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
Array = np.ndarray
Config = dict[str, Any]


def gguf_name(stored: str, architecture: str) -> str:
    if stored in TOP:
        return TOP[stored]
    layer, _, part = stored.removeprefix("model.layers.").partition(".")
    part, _, suffix = part.rpartition(".")
    return f"blk.{layer}.{(GEMMA_PARTS if architecture == 'gemma3' else PARTS)[part]}.{suffix}"


def neighbours_paired(rows: Array, heads: int) -> Array:
    """Element i and i + half of each head become neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def converted(name: str, array: Array, architecture: str, config: Config) -> Array:
    if architecture == "llama" and ".attn_q." in name:
        return neighbours_paired(array, config["num_attention_heads"])
    if architecture == "llama" and ".attn_k." in name:
        return neighbours_paired(array, config["num_key_value_heads"])
    if architecture != "gemma3" or "norm" not in name:
        return array
    # The format has no place for a scale of attention other than 1 / sqrt(head_dim): the recorded one goes into the norm of q.
    scale = math.sqrt(config["head_dim"] / config["query_pre_attn_scalar"]) if "attn_q_norm" in name else 1.0
    return (array + np.float32(1)) * np.float32(scale)


def llama3_factors(rope: Config, head_dim: int) -> Array:
    """By how much each frequency is divided: not at all for short waves, by `factor` for long ones, blended between."""
    window, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    factors = []
    for dim in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (dim / head_dim)
        share = (window / wavelength - low) / (high - low)
        blended = 1 / ((1 - share) / rope["factor"] + share)
        factors.append(1.0 if wavelength < window / high else rope["factor"] if wavelength > window / low else blended)
    return np.array(factors, np.float32)


def write_metadata(writer: gguf.GGUFWriter, architecture: str, config: Config) -> None:
    head_dim, rope = config["head_dim"], config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_merges(["t 1"])


def converted_folder(folder: Path, architecture: str, path: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, architecture, config)
    for stored, array in load_file(folder / "model.safetensors").items():
        name = gguf_name(stored, architecture)
        writer.add_tensor(name, converted(name, array.astype(np.float32), architecture, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("case", "architecture"), CASES.items())
def test_logits_of_a_gguf_file_are_those_of_transformers(
    case: str, architecture: str, golden: Path, tmp_path: Path, causal_logits: Callable[..., Array]
) -> None:
    reference = np.load(golden / case / "reference.npz")
    model = import_gguf(converted_folder(golden / case, architecture, tmp_path / "m.gguf"), name=case)

    logits = causal_logits(model, reference["ids"], prefill=int(reference["prefill"]))

    np.testing.assert_allclose(logits, reference["logits"], atol=2e-4)
