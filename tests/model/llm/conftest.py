"""Small random GGUF files of every architecture and type, and running canonical and lowered graphs in ONNX Runtime."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from shoal.model.affine import FLOAT_DTYPES, Blocks, Dense, Format, dequantise, part_shape
from shoal.model.gguf import import_gguf
from shoal.model.lower import lower
from shoal.model.rope import Rope, YarnScaling, inverse_frequencies
from shoal.model.spec import PAST_PREFIX, PRESENT_PREFIX, ImportedModel, ModelKind, ModelSpec
from shoal.model.transformer import Activation, TransformerConfig, build, matrix_shapes, vector_sizes

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY, CONTEXT = 256, 4, 2, 64, 2, 96, 128
WINDOW = 8
_NUMPY_TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1)
_K_HALVES = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
Array = np.ndarray
Weights = Callable[[int, tuple[int, int], Type], Array]
Logits = Callable[..., Array]


@pytest.fixture(scope="session")
def numbers() -> Callable[..., Array]:
    """Normal fp32 numbers of a shape, the same for the same seed."""

    def make(seed: int, shape: tuple[int, ...]) -> Array:
        return np.random.default_rng(seed).standard_normal(shape, np.float32)  # noqa: TID251 - seeded data of a test

    return make


@pytest.fixture(scope="session")
def encoded(numbers: Callable[..., Array]) -> Weights:
    """Random weights of a matrix as the bytes of a GGUF type, uint8 [rows, bytes per row]."""

    def make(seed: int, shape: tuple[int, int], kind: Type) -> Array:
        weights = numbers(seed, shape) / np.float32(np.sqrt(shape[1]))
        if kind in _NUMPY_TYPES:
            return gguf.quants.quantize(weights, kind).view(np.uint8).reshape(shape[0], -1)
        block, size = GGML_QUANT_SIZES[kind]
        raw = (np.abs(numbers(seed, (shape[0], shape[1] // block, size))) * 1000).astype(np.uint32).astype(np.uint8)
        for at in _K_HALVES[kind]:
            half = np.abs(numbers(seed + at, raw.shape[:2])).astype(np.float16) * np.float16(2e-4)
            raw[..., at : at + 2] = half[..., None].view(np.uint8)
        return raw.reshape(shape[0], -1)

    return make


def _matrices(ffn: int) -> dict[str, tuple[int, int]]:
    inner, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"attn_q": (inner, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, inner)}
    return shapes | {"ffn_gate": (ffn, HIDDEN), "ffn_up": (ffn, HIDDEN), "ffn_down": (HIDDEN, ffn)}


def _vectors(architecture: str) -> dict[str, int]:
    sizes = {"attn_norm.weight": HIDDEN, "ffn_norm.weight": HIDDEN}
    if architecture == "qwen2":
        kv = KV_HEADS * HEAD_DIM
        sizes |= {"attn_q.bias": HEADS * HEAD_DIM, "attn_k.bias": kv, "attn_v.bias": kv}
    if architecture in ("qwen3", "gemma3"):
        sizes |= {"attn_q_norm.weight": HEAD_DIM, "attn_k_norm.weight": HEAD_DIM}
    if architecture == "gemma3":
        sizes |= {"post_attention_norm.weight": HIDDEN, "post_ffw_norm.weight": HIDDEN}
    return sizes


def _write_metadata(writer: gguf.GGUFWriter, architecture: str, ffn: int, more: Mapping[str, object]) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_license("apache-2.0")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if architecture == "gemma3":
        writer.add_sliding_window(WINDOW)
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in more.items():
        add[type(value)](key, value)


@pytest.fixture
def write_gguf(tmp_path: Path, encoded: Weights, numbers: Callable[..., Array]) -> Callable[..., Path]:
    """Write a two-layer model; *types* overrides the type of single tensors, *extra* adds fp32 tensors, *metadata* keys."""

    def make(
        architecture: str = "llama",
        kind: Type = Type.Q4_1,
        *,
        types: Mapping[str, Type] | None = None,
        extra: Mapping[str, Array] | None = None,
        metadata: Mapping[str, object] | None = None,
        tied: bool = True,
    ) -> Path:
        path = tmp_path / f"{architecture}-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        _write_metadata(writer, architecture, 256, metadata or {})
        matrices = {f"blk.{i}.{n}.weight": s for i in range(LAYERS) for n, s in _matrices(256).items()}
        matrices |= dict.fromkeys(("token_embd.weight", *([] if tied else ["output.weight"])), (VOCABULARY, HIDDEN))
        for seed, (name, shape) in enumerate(matrices.items()):
            chosen = (types or {}).get(name, kind)
            writer.add_tensor(name, encoded(seed, shape, chosen), raw_dtype=chosen)
        vectors = {f"blk.{i}.{n}": s for i in range(LAYERS) for n, s in _vectors(architecture).items()}
        for seed, (name, size) in enumerate((vectors | {"output_norm.weight": HIDDEN}).items()):
            writer.add_tensor(name, numbers(1000 + seed, (size,)) * np.float32(0.2) + np.float32("bias" not in name))
        for name, array in (extra or {}).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@pytest.fixture
def tiny(write_gguf: Callable[..., Path]) -> Callable[..., ImportedModel]:
    """Write and import a two-layer model."""
    return lambda *args, **more: import_gguf(write_gguf(*args, **more), name="tiny")


@pytest.fixture(scope="session")
def engine(
    engine_value: Callable[[Array], ort.OrtValue],
) -> Callable[[onnx.ModelProto, Mapping[str, Array]], ort.InferenceSession]:
    """A session over a graph and its arrays: one thread, nothing fused."""
    kept: list[list[Array]] = []  # the engine reads them in place

    def open_session(graph: onnx.ModelProto, arrays: Mapping[str, Array]) -> ort.InferenceSession:
        names = [t.name for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        kept.append([np.ascontiguousarray(arrays[name]) for name in names])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_external_initializers(names, [engine_value(array) for array in kept[-1]])
        return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return open_session


class _Buffers:
    """One in-place cache per layer for lowered graphs, a growing one for canonical graphs."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.inputs = {i.name: i.shape for i in session.get_inputs()}
        in_place = "seqlens_k" in self.inputs
        length = CONTEXT if in_place else 0
        shapes = {n: (1, s[1], length, s[3]) for n, s in self.inputs.items() if n.startswith(PAST_PREFIX)}
        self.caches = {n: ort.OrtValue.ortvalue_from_numpy(np.zeros(s, np.float32)) for n, s in shapes.items()}
        self.in_place = in_place

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        binding = self.session.io_binding()
        for name, value in feeds.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, value)
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
        outputs = [o.name for o in self.session.get_outputs()]
        for name in outputs:
            past = name.replace(PRESENT_PREFIX, PAST_PREFIX)
            if self.in_place and past in self.caches:
                binding.bind_ortvalue_output(name, self.caches[past])
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        results = dict(zip(outputs, binding.get_outputs(), strict=True))
        for name in () if self.in_place else self.caches:
            self.caches[name] = results[name.replace(PAST_PREFIX, PRESENT_PREFIX)]
        return {n: v.numpy() for n, v in results.items() if not n.startswith(PRESENT_PREFIX)}


@pytest.fixture(scope="session")
def run_chain(engine: Callable[..., ort.InferenceSession]) -> Logits:
    """Logits [N, V] of *ids* through graphs one after another, in steps of the given sizes (one step by default)."""

    def run(parts: Sequence[ImportedModel], ids: Array, steps: Sequence[int] = ()) -> Array:
        stages = [_Buffers(engine(p.graph, _Arrays(p.tensors))) for p in parts]
        rows, start = [], 0
        for count in steps or (len(ids),):
            stop = start + count
            values = {
                "input_ids": ids[None, start:stop].astype(np.int64),
                "position_ids": np.arange(start, stop, dtype=np.int64)[None],
                "logit_rows": np.arange(count, dtype=np.int64),
                "seqlens_k": np.array([stop - 1], np.int32),
                "total_sequence_length": np.array(stop, np.int32),
            }
            for stage in stages:
                values |= stage.run(values)
            rows.append(values["logits"][0])
            start = stop
        return np.concatenate(rows)

    return run


class _Arrays(dict):
    """Arrays computed when asked for."""

    def __getitem__(self, name: str) -> Array:
        return super().__getitem__(name)()


@pytest.fixture(scope="session")
def run_model(run_chain: Logits) -> Logits:
    """Logits of a whole model, canonical or already lowered."""
    return lambda model, ids, steps=(): run_chain([model], ids, steps)


@pytest.fixture(scope="session")
def run_lowered(run_chain: Logits, with_derived: Callable[..., ImportedModel]) -> Logits:
    """Logits of a model lowered for *target*."""

    def run(model: ImportedModel, ids: Array, steps: Sequence[int] = (), target: str = "cpu-exact") -> Array:
        return run_chain([with_derived(model, lower(model.graph, target=target))], ids, steps)

    return run


@pytest.fixture
def token_ids() -> Array:
    """Forty ids of the tiny vocabulary."""
    return np.arange(40) * 37 % VOCABULARY


@pytest.fixture(scope="session")
def model_of() -> Callable[..., ImportedModel]:
    """An imported model out of a graph and its arrays."""
    spec = ModelSpec(name="tiny", kind=ModelKind.CAUSAL_LM, architecture="llama")
    return lambda graph, tensors: ImportedModel(spec=spec, graph=graph, tensors=tensors)


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "tied": {"tied_embedding": True},
    "biased": {"attention_bias": True},
    "normed": {"qk_norm": True, "post_norms": True, "activation": Activation.GELU_TANH, "embedding_scale": 8.0},
    "windowed": {"window": 4, "sliding_layers": (0,), "local_rope": Rope(base=100.0, dims=16)},
    "capped": {"logit_softcap": 30.0, "attention_softcap": 2.0, "attention_scale": 0.7},
    "yarn": {"rope": Rope(base=1e4, dims=16, scaling=YarnScaling(factor=4.0, original_context_tokens=8))},
}


@pytest.fixture(scope="session")
def small_config() -> Callable[..., TransformerConfig]:
    """A description of two layers of 64, with changes."""
    base = TransformerConfig(
        architecture="llama",
        layers=2,
        hidden=64,
        ffn=96,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=50,
        context_tokens=32,
        norm_epsilon=1e-5,
        rope=Rope(base=10_000.0, dims=16),
    )
    return lambda **changes: msgspec.structs.replace(base, **changes)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, small_config: Callable[..., TransformerConfig]) -> TransformerConfig:
    """Each architecture's peculiarities."""
    return small_config(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def random_model(numbers: Callable[..., Array], model_of: Callable[..., ImportedModel]) -> Callable[..., ImportedModel]:
    """A model of a description, its matrices random numbers stored in one format."""

    def make(config: TransformerConfig, form: Format | None = None) -> ImportedModel:
        form = form or Dense()
        matrices = matrix_shapes(config)
        arrays: dict[str, Array] = {n: numbers(i, (s,)) for i, (n, s) in enumerate(vector_sizes(config).items())}
        arrays |= {name: inverse_frequencies(rope) for name, rope in config.rotations.items()}
        for seed, (name, shape) in enumerate(matrices.items()):
            arrays |= _stored(numbers, 1000 + seed, name, shape, form)
        return model_of(build(config, dict.fromkeys(matrices, form)), {n: lambda a=a: a for n, a in arrays.items()})

    return make


def _stored(
    numbers: Callable[..., Array], seed: int, name: str, shape: tuple[int, int], form: Format
) -> dict[str, Array]:
    if isinstance(form, Dense):
        return {name: (numbers(seed, shape) / np.float32(np.sqrt(shape[1]))).astype(FLOAT_DTYPES[form.dtype])}
    parts = {suffix: part_shape(suffix, form, shape) for suffix in form.suffixes}
    bits = (np.abs(numbers(seed, parts.pop(".q")[1])) * 1e6).astype(np.uint32).astype(np.uint8)
    scales = {s: numbers(seed + i, size).astype(dtype) for i, (s, (dtype, size)) in enumerate(parts.items())}
    return {name + ".q": bits} | {name + s: a * a.dtype.type(2.0**-form.bits) for s, a in scales.items()}


@pytest.fixture(scope="session")
def in_fp32(model_of: Callable[..., ImportedModel]) -> Callable[..., ImportedModel]:
    """The same model with its matrices dequantised."""

    def make(model: ImportedModel, config: TransformerConfig, form: Format) -> ImportedModel:
        arrays = {name: array() for name, array in model.tensors.items()}
        for name in matrix_shapes(config):
            if isinstance(form, Dense):
                arrays[name] = arrays[name].astype(np.float32)
            else:
                arrays[name] = dequantise(Blocks(*(arrays[name + suffix] for suffix in form.suffixes)), form)
        return model_of(build(config, {}), {n: lambda a=a: a for n, a in arrays.items()})

    return make
