"""From a Hugging Face config.json to the description of a transformer.

Transformers leaves out of config.json what equals its class defaults, so an absent key means the default of *that*
architecture (`_DEFAULTS`).  Version 5 moved all that concerns rotation into `rope_parameters` (one per layer type for
gemma3); both spellings are read.  What changes the arithmetic and has no place in `TransformerConfig` is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.rope import LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling
from shoal.model.transformer import Activation, TransformerConfig

SUPPORTED: Mapping[str, tuple[str, ...]] = {
    "llama": ("LlamaForCausalLM",),
    "mistral": ("MistralForCausalLM",),
    "qwen2": ("Qwen2ForCausalLM",),
    "qwen3": ("Qwen3ForCausalLM",),
    "gemma3_text": ("Gemma3ForCausalLM",),
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
    "bert": ("BertModel", "BertForMaskedLM"),
}
"""`model_type` and the classes in `architectures` that Shoal imports (gemma3: the text part; bert: without its heads)."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
}
_REFUSED = ("quantization_config", "use_bidirectional_attention", "mlp_bias")


class _Config(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that we use, as Transformers names them."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    vocab_size: int = 32_000
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_local_base_freq: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    hidden_act: str = "silu"
    hidden_activation: str | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    sliding_window_pattern: int = 6
    query_pre_attn_scalar: float | None = None
    attention_bias: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None


def model_type_of(config: Mapping[str, Any]) -> str:
    """`model_type` of a config.json when its class is supported, else raise UnsupportedModelError."""
    model_type, classes = str(config.get("model_type")), config.get("architectures") or []
    allowed = SUPPORTED.get(model_type, ())
    if allowed and all(c in allowed for c in classes):
        return model_type
    raise UnsupportedModelError(
        f"architecture {', '.join(map(str, classes)) or 'without a name'} (model_type {model_type!r}) is not supported",
        hint="supported are " + ", ".join(sorted({c for row in SUPPORTED.values() for c in row})),
    )


def config_of(config: Mapping[str, Any]) -> TransformerConfig:
    """Describe a decoder-only model; raises UnsupportedModelError or CorruptFileError."""
    model_type = model_type_of(config)
    if model_type == "gemma3":
        model_type, config = "gemma3_text", {**config.get("text_config", {}), "model_type": "gemma3_text"}
    for key in _REFUSED:
        if config.get(key):
            raise UnsupportedModelError(
                f"{key} in config.json is not supported", hint="use an unquantised, plain copy of the model"
            )
    given = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    if "_sliding_window_pattern" in given:
        given.setdefault("sliding_window_pattern", given["_sliding_window_pattern"])
    try:
        parsed = msgspec.convert({**_DEFAULTS[model_type], **given}, _Config)
    except msgspec.ValidationError as error:
        raise CorruptFileError(f"config.json: {error}", hint="fetch the file again") from error
    _check_sizes(parsed)
    return _describe(parsed, head_dim=parsed.head_dim or parsed.hidden_size // parsed.num_attention_heads)


def _check_sizes(c: _Config) -> None:
    sizes = (
        c.hidden_size,
        c.intermediate_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.vocab_size,
        c.max_position_embeddings,
    )
    kv_heads = c.num_attention_heads if c.num_key_value_heads is None else c.num_key_value_heads
    if min(*sizes, kv_heads) < 1 or c.num_attention_heads % kv_heads:
        raise CorruptFileError(
            f"config.json: {c.num_attention_heads} heads over {kv_heads} key-value heads and sizes {sizes} make no model",
            hint="fetch the file again",
        )


def _describe(c: _Config, *, head_dim: int) -> TransformerConfig:
    gemma = c.model_type == "gemma3_text"
    rope, local_rope = _ropes(c, head_dim)
    scalar = c.query_pre_attn_scalar if gemma else None
    return TransformerConfig(
        architecture="gemma3" if gemma else c.model_type,
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        ffn=c.intermediate_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads or c.num_attention_heads,
        head_dim=head_dim,
        vocabulary=c.vocab_size,
        context_tokens=c.max_position_embeddings,
        norm_epsilon=c.rms_norm_eps,
        rope=rope,
        local_rope=local_rope,
        window=c.sliding_window or 0,
        sliding_layers=_sliding_layers(c),
        attention_scale=None if scalar is None else 1 / math.sqrt(scalar),
        attention_bias=c.attention_bias or c.model_type == "qwen2",
        qk_norm=gemma or c.model_type == "qwen3",
        post_norms=gemma,
        activation=_activation((c.hidden_activation if gemma else None) or c.hidden_act),
        embedding_scale=math.sqrt(c.hidden_size) if gemma else 1.0,
        tied_embedding=c.tie_word_embeddings,
        attention_softcap=c.attn_logit_softcapping or 0.0,
        logit_softcap=c.final_logit_softcapping or 0.0,
    )


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported", hint=f"supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _sliding_layers(c: _Config) -> tuple[int, ...]:
    """Layers that see only `sliding_window` positions."""
    layers = range(c.num_hidden_layers)
    if not c.sliding_window or (c.model_type in {"qwen2", "qwen3"} and not c.use_sliding_window):
        return ()
    if c.layer_types is not None:
        return tuple(layer for layer, kind in zip(layers, c.layer_types, strict=False) if kind == "sliding_attention")
    match c.model_type:
        case "mistral":
            return tuple(layers)
        case "gemma3_text":
            return tuple(layer for layer in layers if (layer + 1) % c.sliding_window_pattern)
        case "qwen2" | "qwen3":
            return tuple(layer for layer in layers if layer >= c.max_window_layers)
        case _:
            return ()


def _ropes(c: _Config, head_dim: int) -> tuple[Rope, Rope | None]:
    """Rotations of the full and, for gemma3, the sliding layers."""
    dims = int(head_dim * c.partial_rotary_factor)
    given = c.rope_parameters or {}
    if "full_attention" in given:
        return _rope(c, given["full_attention"], dims), _rope(c, given["sliding_attention"], dims)
    # Before version 5 the scaling of gemma3 concerned its full layers only, and the other base stood apart.
    plain = _rope(c, {**(c.rope_scaling or {}), **given}, dims)
    return plain, Rope(base=c.rope_local_base_freq, dims=dims) if c.model_type == "gemma3_text" else None


def _rope(c: _Config, given: Mapping[str, Any], dims: int) -> Rope:
    kind = given.get("rope_type", given.get("type", "default"))
    try:
        scaling = scaling_of(kind, given, c.max_position_embeddings)
        return Rope(base=float(given.get("rope_theta", c.rope_theta)), dims=dims, scaling=scaling)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"config.json: rope scaling {kind!r} with {sorted(given)} lacks or misstates {error}",
            hint="fetch the file again",
        ) from error


def scaling_of(kind: str, given: Mapping[str, Any], context_tokens: int) -> Scaling | None:
    """The scaling that `rope_scaling` or `rope_parameters` describes; KeyError names what is missing."""
    original = int(given.get("original_max_position_embeddings") or context_tokens)
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(given["factor"]))
        case "llama3":
            return Llama3Scaling(
                factor=float(given["factor"]),
                low_freq_factor=float(given["low_freq_factor"]),
                high_freq_factor=float(given["high_freq_factor"]),
                original_context_tokens=original,
            )
        case "yarn" if not {"mscale", "mscale_all_dim"} & given.keys() and given.get("truncate", True):
            temperature = given.get("attention_factor")
            return YarnScaling(
                factor=float(given["factor"]),
                original_context_tokens=original,
                beta_fast=float(given.get("beta_fast") or 32),
                beta_slow=float(given.get("beta_slow") or 1),
                attention_factor=None if temperature is None else float(temperature),
            )
        case _:
            raise UnsupportedModelError(
                f"rope scaling {kind!r} with {sorted(given)} is not supported",
                hint="supported are linear, llama3 and plain yarn",
            )
