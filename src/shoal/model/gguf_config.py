"""What the metadata of a GGUF file say about the architecture and the special tokens.

llama GGUFs hold q and k with their rows permuted so that rotation pairs neighbours; we keep the rows and rotate interleaved.
Gemma's norms already have their 1 added, and the tensor `rope_freqs` divides the frequencies of Llama 3.
"""

from collections.abc import Mapping
from math import isfinite, sqrt

import msgspec
import numpy as np

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.gguf_blocks import dense_array, dense_types
from shoal.model.gguf_file import GgufFile, Value
from shoal.model.rope import FactorScaling, LinearScaling, Rope, Scaling, YarnScaling
from shoal.model.transformer import EMBEDDING_WEIGHT, HEAD_WEIGHT, Activation, TransformerConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
ROPE_FREQS = "rope_freqs.weight"
GEMMA3_27B_LAYERS = 62
"""That size alone scales attention by hidden / heads instead of head_dim, and its files do not say so."""
GEMMA3_PATTERN = 6
"""Every sixth layer of gemma3 is global."""
LOCAL_BASE = 10_000.0
MAX_COUNT = 2**31 - 1
BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3")
"""Pre-tokenizers whose files begin with BOS although they do not say so (as llama.cpp does)."""

END_TEXTS: Mapping[str, tuple[str, ...]] = {
    "eot": (
        "<end_of_turn>",
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|end_of_turn|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "[EOT]",
    ),
    "eom": ("<|eom_id|>",),
}
"""How models write the end of a turn and of a message, for files that do not say its id (llama.cpp looks for the same)."""
CONTROL = 3
"""Type of a token that a text never contains."""


class SpecialTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids that begin and end a text."""

    bos: int | None
    eos: tuple[int, ...]
    add_bos: bool


def special_tokens(metadata: Mapping[str, Value]) -> SpecialTokens:
    """Read the ids; the end of a turn or of a message ends an answer as an end of sequence does."""
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")}
    known = {key: value for key, value in ids.items() if isinstance(value, int)}
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in BOS_BY_DEFAULT
    unsaid = {text for key, texts in END_TEXTS.items() if key not in known for text in texts}
    named = [known[key] for key in ("eos", "eot", "eom") if key in known]
    return SpecialTokens(
        bos=known.get("bos"),
        eos=tuple(dict.fromkeys((*named, *_control_tokens(metadata, unsaid)))),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", default)),
    )


def _control_tokens(metadata: Mapping[str, Value], texts: set[str]) -> list[int]:
    """Ids of *texts* in the vocabulary; where the file gives types, of control tokens alone."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list):
        return []
    found = [token for token, text in enumerate(tokens) if isinstance(text, str) and text in texts]
    return [t for t in found if not isinstance(types, list) or (t < len(types) and types[t] == CONTROL)]


class _Metadata:
    """Typed access; keys are relative to the architecture."""

    def __init__(self, values: Mapping[str, Value], architecture: str) -> None:
        self._values, self._prefix = values, architecture + "."

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(self._prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CorruptFileError(
                f"metadata {self._prefix}{key} is {value!r}, not a number", hint="download the file again"
            )
        if not isfinite(value):
            raise CorruptFileError(f"metadata {self._prefix}{key} is {value}", hint="download the file again")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; a list (one number per layer) must repeat one number."""
        value = self._values.get(self._prefix + key, default)
        if isinstance(value, list):
            if len({str(v) for v in value}) > 1:
                raise UnsupportedModelError(
                    f"{self._prefix}{key} differs between layers", hint="such models are not supported yet"
                )
            value = value[0] if value else None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_COUNT:
            raise CorruptFileError(
                f"metadata {self._prefix}{key} is {value!r}, not a positive number", hint="download the file again"
            )
        return value

    def text(self, key: str) -> str:
        return str(self._values.get(self._prefix + key, ""))


def config_of(file: GgufFile) -> TransformerConfig:
    """Describe the model; raises CorruptFileError for missing or impossible values, UnsupportedModelError for unknown ones."""
    architecture = str(file.metadata.get("general.architecture", ""))
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported", hint=f"supported: {', '.join(ARCHITECTURES)}"
        )
    meta = _Metadata(file.metadata, architecture)
    if meta.number("expert_count", 0):
        raise UnsupportedModelError("mixtures of experts are not supported", hint="choose a dense model")
    layers, heads, hidden = (
        meta.count("block_count"),
        meta.count("attention.head_count"),
        meta.count("embedding_length"),
    )
    if layers > len(file.tensors):
        raise CorruptFileError(f"{layers} layers, but only {len(file.tensors)} tensors", hint="download the file again")
    head_dim = meta.count("attention.key_length", hidden // heads)
    gemma = architecture == "gemma3"
    config = TransformerConfig(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        ffn=meta.count("feed_forward_length"),
        heads=heads,
        kv_heads=meta.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocabulary=_vocabulary(file),
        context_tokens=meta.count("context_length"),
        norm_epsilon=meta.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(file, meta, head_dim, interleaved=architecture == "llama"),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        post_norms="blk.0.post_attention_norm.weight" in file.tensors,
        activation=Activation.GELU_TANH if gemma else Activation.SILU,
        embedding_scale=sqrt(hidden) if gemma else 1.0,
        tied_embedding=HEAD_WEIGHT not in file.tensors,
        logit_softcap=meta.number("final_logit_softcapping", 0.0),
    )
    _check(config)
    return _with_windows(config, meta) if gemma else config


def _vocabulary(file: GgufFile) -> int:
    if EMBEDDING_WEIGHT not in file.tensors:
        raise CorruptFileError(
            f"the file has no tensor {EMBEDDING_WEIGHT}", hint="download it again, whole: split files are not supported"
        )
    return file.tensors[EMBEDDING_WEIGHT].shape[0]


def _check(config: TransformerConfig) -> None:
    """Refuse numbers that no graph can have."""
    c = config
    if c.heads % c.kv_heads:
        raise CorruptFileError(
            f"{c.heads} heads cannot share {c.kv_heads} key heads evenly", hint="download the file again"
        )
    if c.rope.dims % 2 or c.rope.dims > c.head_dim or c.rope.base <= 1:
        raise CorruptFileError(
            f"rotation of {c.rope.dims} of {c.head_dim} dimensions with base {c.rope.base} is impossible",
            hint="download the file again",
        )
    if isinstance(c.rope.scaling, FactorScaling) and len(c.rope.scaling.factors) != c.rope.dims // 2:
        raise CorruptFileError(
            f"{ROPE_FREQS} has {len(c.rope.scaling.factors)} factors for {c.rope.dims} dimensions",
            hint="download the file again",
        )


def _with_windows(config: TransformerConfig, meta: _Metadata) -> TransformerConfig:
    """Add gemma3's pattern: local layers with a window and their own rotation, every sixth layer global."""
    pattern = meta.count("attention.sliding_window_pattern", GEMMA3_PATTERN)
    local = Rope(base=meta.number("rope.freq_base_swa", LOCAL_BASE), dims=config.rope.dims)
    big = config.layers == GEMMA3_27B_LAYERS
    return msgspec.structs.replace(
        config,
        window=meta.count("attention.sliding_window"),
        sliding_layers=tuple(i for i in range(config.layers) if (i + 1) % pattern),
        local_rope=local,
        attention_scale=sqrt(config.heads / config.hidden) if big else None,
    )


def _rope(file: GgufFile, meta: _Metadata, head_dim: int, *, interleaved: bool) -> Rope:
    return Rope(
        base=meta.number("rope.freq_base", 10_000.0),
        dims=meta.count("rope.dimension_count", head_dim),
        interleaved=interleaved,
        scaling=_rope_factors(file) or _rope_scaling(meta),
    )


def _rope_factors(file: GgufFile) -> FactorScaling | None:
    tensor = file.tensors.get(ROPE_FREQS)
    if tensor is None:
        return None
    factors = dense_array(tensor).astype(np.float64).ravel() if tensor.type in dense_types() else np.zeros(1)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CorruptFileError(f"tensor {ROPE_FREQS} does not hold positive numbers", hint="download the file again")
    return FactorScaling(factors=tuple(float(f) for f in factors))


def _rope_scaling(meta: _Metadata) -> Scaling | None:
    kind = meta.text("rope.scaling.type")
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    if kind not in ("", "none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported", hint="supported: linear, yarn, rope_freqs"
        )
    if factor <= 0:
        raise CorruptFileError(f"rope scaling factor is {factor}", hint="download the file again")
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            original_context_tokens=meta.count("rope.scaling.original_context_length"),
            beta_fast=meta.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=meta.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    return None if kind == "none" or factor == 1.0 else LinearScaling(factor=factor)
