"""The tiny models: one per architecture, each with the feature that tells right from nearly right."""

from dataclasses import dataclass, field
from typing import Any

import transformers

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """A folder name, the configuration class, what differs from SHAPE, and the seed of its weights.

    A tied embedding that is scaled up (gemma) must be small, or each token's own row decides its logits alone.
    """

    name: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    embedding_std: float = 0.5


CAUSAL = (
    Case("llama", "LlamaConfig", {"tie_word_embeddings": False, "vocab_size": 64}, seed=10),
    Case(
        "llama3-rope",
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            # small factors and a short original context, so that all three frequency bands of the scaling are met
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        seed=20,
    ),
    Case(
        "llama-linear-rope",
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        seed=25,
    ),
    Case(
        "mistral",
        "MistralConfig",
        {"tie_word_embeddings": False, "sliding_window": 16, "num_key_value_heads": 1},
        seed=30,
    ),
    Case("qwen2", "Qwen2Config", {"tie_word_embeddings": True}, seed=40),
    Case(
        "qwen3",
        "Qwen3Config",
        {"tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 1, "intermediate_size": 32},
        seed=50,
    ),
    Case(
        "gemma3",
        "Gemma3TextConfig",
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "intermediate_size": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
        },
        seed=60,
        embedding_std=0.15,
    ),
)

ENCODERS = (
    Case(
        "bert",
        "BertConfig",
        {"num_key_value_heads": None, "pad_token_id": 0, "type_vocab_size": 2, "max_position_embeddings": 32},
        seed=70,
    ),
)

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
}
"""Rotations whose inverse frequencies are recorded by themselves, at the sizes of real models."""


def make_config(case: Case) -> transformers.PretrainedConfig:
    """The configuration of *case*."""
    values = {key: value for key, value in {**SHAPE, **case.changes}.items() if value is not None}
    return getattr(transformers, case.config)(**values)
