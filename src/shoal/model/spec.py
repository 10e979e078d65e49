"""What a model is, apart from its weights.

The canonical graph of every model follows one naming convention for its inputs and outputs (that of
onnxruntime-genai folders, so that those are taken as they are).  An engine session feeds an input by its
*role*, which is its name; a graph lists only the roles that it needs:

    input_ids               int64 [1, T]             token ids of this step
    attention_mask          int64 [1, P + T]         ones; P positions are already in the cache
    position_ids            int64 [1, T]             absolute positions
    past_key_values.N.key   float [1, H, P, D]       cache of layer N before the step (.value likewise)
    present.N.key           float [1, H, P + T, D]   the cache after it (.value likewise)
    seqlens_k               int32 [1]                P + T - 1      (graphs lowered to GroupQueryAttention)
    total_sequence_length   int32 []                 P + T          (likewise)
    logit_rows              int64 [R]                rows of this step whose logits are wanted
    logits                  float [1, R, V]          R = T where the graph has no logit_rows

Any other input or output is a boundary tensor between blocks, or a tensor of a plain model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

Array = NDArray[np.generic]

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
SEQLENS_K = "seqlens_k"
TOTAL_SEQUENCE_LENGTH = "total_sequence_length"
LOGIT_ROWS = "logit_rows"
LOGITS = "logits"
PAST_PREFIX = "past_key_values."
PRESENT_PREFIX = "present."


class ModelKind(StrEnum):
    """What one may ask of a model."""

    CAUSAL_LM = "causal_lm"
    ENCODER = "encoder"
    TENSOR = "tensor"


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of a model that planning, serving and listing need; nothing here depends on an engine.

    `context_tokens`, `vocabulary`, `hidden`, `layers`, `kv_heads` and `head_dim` are 0 where the kind has none.
    `lowered_for` names the execution provider of a graph that came already lowered, else it is None.
    `pooling` is how an encoder's token vectors become one embedding ("mean", "cls" or None).
    """

    name: str
    kind: ModelKind
    architecture: str
    licence: str = "unknown"
    source: str = ""
    parameters: int = 0
    context_tokens: int = 0
    vocabulary: int = 0
    hidden: int = 0
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool = False
    lowered_for: str | None = None
    pooling: str | None = None
    normalise: bool = False
    quantisation: str = ""
    import_error: float | None = None
    """Largest relative error (Frobenius, per tensor) that quantising at import made, measured on rows spread over each tensor;
    None: nothing was rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedModel:
    """What an importer gives: a graph whose initializers are external stubs, and their arrays on demand.

    `graph.graph.initializer` entries above 1 KiB have `data_location == EXTERNAL` and `location` = their own name;
    `tensors[name]()` reads (or derives) that array, so that an importer's peak memory is one tensor.
    `files` are small files that travel with the model: `tokenizer.json`, `chat_template.jinja`, `genai_config.json`.
    """

    spec: ModelSpec
    graph: onnx.ModelProto
    tensors: Mapping[str, Callable[[], Array]]
    files: Mapping[str, bytes] = field(default_factory=dict)
