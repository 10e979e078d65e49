"""What single engines add to the contract: cost, throttle, plain models, memory, errors."""

import mmap
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from shoal.clock import ManualClock
from shoal.errors import InvalidRequestError, UnsupportedModelError
from shoal.ids import RequestId
from shoal.profile.fleet import BlockTrial
from shoal.runtime.backend.null import NullBackend, null_shard, trial_cost
from shoal.runtime.backend.onnx import OnnxBackend, providers
from shoal.runtime.backend.pages import SlotPages
from shoal.runtime.backend.roles import CacheTensor, roles_of
from shoal.runtime.backend.throttled import Throttled
from shoal.runtime.ports import SequenceStep, Shard


def rows(count: int, *, start: int = 0) -> SequenceStep:
    return SequenceStep(request=RequestId("r"), slot=0, start=start, count=count, logits=1)


def trial(kind: str, rows: int, time_s: float, *, context: int = 0) -> BlockTrial:
    return BlockTrial(kind=kind, rows=rows, batch=1, context=context, time_s=time_s, spread_s=0.0)


def test_a_null_step_costs_what_the_trials_predict() -> None:
    clock = ManualClock()
    trials = [trial("attn", 1, 0.1), trial("attn", 11, 1.1), trial("ffn", 1, 0.01), trial("ffn", 11, 0.01)]
    cost_s = trial_cost(trials, ["attn", "ffn", "attn"], overhead_s=0.5)
    session = NullBackend(cost_s=cost_s, wait=clock.advance).load(null_shard(0, 2))

    session.step([rows(6)], {"input_ids": np.ones((1, 6), np.int64)})

    assert clock.now_s() == pytest.approx(0.5 + 0.6 + 0.01 + 0.6)


def test_a_null_step_uses_the_trials_of_the_nearest_context_and_grows_in_proportion_beyond_them() -> None:
    trials = [trial("attn", 1, 0.1), trial("attn", 1, 0.4, context=100), trial("attn", 10, 4.0, context=100)]
    cost_s = trial_cost(trials, ["attn"])

    assert cost_s([rows(1, start=10)]) == pytest.approx(0.1)
    assert cost_s([rows(1, start=90)]) == pytest.approx(0.4)
    assert cost_s([rows(20, start=90)]) == pytest.approx(8.0)


def test_a_cost_without_trials_names_the_kind_that_is_missing() -> None:
    with pytest.raises(InvalidRequestError, match="ffn"):
        trial_cost([trial("attn", 1, 0.1)], ["attn", "ffn"])


def throttled(cpu_steps_s: Sequence[float], sleeps_late_s: float) -> tuple[ManualClock, Callable[[], None]]:
    """An engine whose steps take the given CPU times, slowed down fourfold by sleeps that come late."""
    clock = ManualClock()
    times = iter(cpu_steps_s)
    inner = NullBackend(cost_s=lambda _: next(times), wait=clock.advance)
    spent = {"waiting_s": 0.0}

    def wait(seconds: float) -> None:
        spent["waiting_s"] += seconds + sleeps_late_s
        clock.advance(seconds + sleeps_late_s)

    backend = Throttled(inner, lambda: 4.0, clock, lambda: clock.now_s() - spent["waiting_s"], wait)
    session = backend.load(null_shard(0, 1))
    return clock, lambda: session.step([rows(1)], {"input_ids": np.ones((1, 1), np.int64)}) and None


def test_a_throttled_step_takes_its_cpu_time_as_often_as_asked() -> None:
    clock, step = throttled([0.5], 0.0)

    step()

    assert clock.now_s() == pytest.approx(2.0)


def test_what_a_sleep_overshoots_is_taken_off_the_next_step() -> None:
    clock, step = throttled([0.5] * 20, sleeps_late_s=0.25)

    for _ in range(20):
        step()

    assert clock.now_s() == pytest.approx(20 * 2.0 + 0.25)


def test_a_long_stall_is_not_made_up_for_by_a_run_of_fast_steps() -> None:
    clock, step = throttled([0.5] * 4, sleeps_late_s=100.0)

    for _ in range(4):
        step()

    assert clock.now_s() > 100.0 + 3 * 0.5


def plain_model(op: str, *, domain: str = "") -> onnx.ModelProto:
    """y = op(x, w) with an external w `[4, 3]`."""
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    w.external_data.add(key="location", value="w")
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], domain=domain, name="the_node")],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [w],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def plain_shard(model: onnx.ModelProto) -> Shard:
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    return Shard(graph=model, tensors={"w": w}, slots=0, context_tokens=0, threads=1)


def test_a_plain_model_takes_tensors_by_name_and_any_batch() -> None:
    session = OnnxBackend().load(plain_shard(plain_model("MatMul")))

    for batch in (1, 5):
        x = np.ones((batch, 4), np.float32)
        outputs = session.step((), {"x": x})
        assert outputs["y"].tolist() == [[18.0, 22.0, 26.0]] * batch


def test_loading_leaves_the_shard_as_it_was() -> None:
    shard = plain_shard(plain_model("MatMul"))
    before = shard.graph.SerializeToString()

    OnnxBackend().load(shard)

    assert shard.graph.SerializeToString() == before


@pytest.mark.parametrize("tensors", [{}, {"x": np.ones((2, 5), np.float32)}, {"x": np.ones(4, np.float32)}])
def test_inputs_that_do_not_fit_are_the_callers_mistake(tensors: dict[str, np.ndarray]) -> None:
    session = OnnxBackend().load(plain_shard(plain_model("MatMul")))

    with pytest.raises(InvalidRequestError, match="x"):
        session.step((), tensors)


@pytest.mark.parametrize("domain", ["", "com.microsoft", "elsewhere"])
def test_an_operator_that_the_engine_lacks_is_named(domain: str) -> None:
    model = plain_model("Teleport", domain=domain)
    if domain == "elsewhere":
        model.opset_import.append(helper.make_opsetid(domain, 1))

    with pytest.raises(UnsupportedModelError, match="Teleport"):
        OnnxBackend().load(plain_shard(model))


def test_pieces_of_our_own_models_keep_their_cuts_exact_and_foreign_ones_are_optimised() -> None:
    foreign, ours = plain_model("MatMul"), plain_model("MatMul")
    ours.producer_name = "shoal"

    assert not roles_of(foreign).exact_cuts
    assert roles_of(ours).exact_cuts


def genai_shard(context: int = 32) -> Shard:
    """One attention layer by the convention of onnxruntime-genai: a mask whose sum and length say how full the shared cache is."""
    heads, dim, width = 2, 16, 32
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Gather", ["table", "input_ids"], ["qkv"], axis=0),
        node("ReduceSum", ["attention_mask", "axis"], ["filled"], keepdims=0),
        node("Sub", ["filled", "one"], ["last"]),
        node("Cast", ["last"], ["lengths"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["mask_shape"]),
        node("Gather", ["mask_shape", "at"], ["total_long"], axis=0),
        node("Cast", ["total_long"], ["total"], to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_key_values.0.key", "past_key_values.0.value", "lengths", "total"],
            ["y", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=heads,
        ),
        node("MatMul", ["y", "head"], ["logits"]),
    ]
    cache = [f"0.{part}" for part in ("key", "value")]
    inputs = [
        info(name, TensorProto.INT64, ["B", size]) for name, size in (("input_ids", "T"), ("attention_mask", "all"))
    ]
    inputs += [info(f"past_key_values.{c}", TensorProto.FLOAT, ["B", heads, "past", dim]) for c in cache]
    outputs = [info("logits", TensorProto.FLOAT, ["B", "T", 8])]
    outputs += [info(f"present.{c}", TensorProto.FLOAT, ["B", heads, "total", dim]) for c in cache]
    weights = [
        onnx.numpy_helper.from_array(
            np.sin(np.arange(50 * 3 * width, dtype=np.float32)).reshape(50, 3 * width), "table"
        ),
        onnx.numpy_helper.from_array(np.cos(np.arange(width * 8, dtype=np.float32)).reshape(width, 8), "head"),
        onnx.numpy_helper.from_array(np.array([1]), "axis"),
        onnx.numpy_helper.from_array(np.array([1]), "one"),
        onnx.numpy_helper.from_array(np.array(1), "at"),
    ]
    graph = helper.make_graph(nodes, "genai", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Shard(graph=model, tensors={}, slots=2, context_tokens=context, threads=1)


def test_a_genai_graph_is_taken_as_it_is_and_shares_its_cache() -> None:
    ids = np.array([[(5 * i + 1) % 50 for i in range(20)]])
    whole = OnnxBackend().load(genai_shard()).step([rows(20)], {"input_ids": ids})["logits"]
    session = OnnxBackend().load(genai_shard())

    session.step([rows(12)], {"input_ids": ids[:, :12]})
    for at in range(12, 20):
        stepped = session.step([rows(1, start=at)], {"input_ids": ids[:, at : at + 1]})["logits"]

    pages = session._pages
    assert whole.shape == (1, 8)
    assert stepped == pytest.approx(whole, abs=1e-5)
    assert pages is not None
    assert pages.arrays["past_key_values.0.key"][0, 0, 19].any()
    assert not pages.arrays["past_key_values.0.key"][0, 0, 20].any()


def test_a_cache_without_sizes_is_refused_with_its_name() -> None:
    model = plain_model("MatMul")
    model.graph.input.append(
        helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, [1, "H", "P", 8])
    )

    with pytest.raises(UnsupportedModelError, match=r"past_key_values\.0\.key"):
        OnnxBackend().load(plain_shard(model))


def test_the_cpu_is_always_among_the_providers_and_none_is_remote() -> None:
    assert "CPUExecutionProvider" in providers()
    assert "AzureExecutionProvider" not in providers()


def resident_bytes(pages: SlotPages) -> int:
    """Bytes of the mapping that the system has committed."""
    address = next(iter(pages.arrays.values())).ctypes.data
    inside = False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(part, 16) for part in head.split("-"))
                inside = low <= address < high
            elif inside and head == "Rss:":
                return int(line.split()[1]) * 1024
    raise AssertionError("the mapping is gone")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_a_slot_costs_what_it_holds_and_gives_it_back() -> None:
    cache = [
        CacheTensor(past=f"k{i}", present=f"p{i}", dtype=np.dtype(np.float32), heads=2, head_dim=64) for i in range(4)
    ]
    pages = SlotPages(cache, 3, context_tokens=4096)
    reserved, fresh = pages.reserved_bytes, resident_bytes(pages)

    for array in pages.arrays.values():
        array[1:, :, :512] = 1.0
    filled = resident_bytes(pages)
    assert pages.give_back(1)

    assert reserved == 3 * 4 * 2 * 64 * 4 * 4096
    assert fresh == 0
    assert filled == 2 * reserved // 3 // 8
    assert resident_bytes(pages) == filled // 2
    assert all((array[1] == 0).all() and (array[2, :, :512] == 1).all() for array in pages.arrays.values())
    assert pages.give_back(2)
    assert resident_bytes(pages) == 0


def test_a_slot_of_an_odd_length_begins_at_a_page() -> None:
    cache = [CacheTensor(past="k", present="p", dtype=np.dtype(np.float32), heads=3, head_dim=80)]
    pages = SlotPages(cache, 2, context_tokens=100)
    array = pages.arrays["k"]
    array[...] = 1.0

    assert array.shape[2] >= 100
    assert (array[1].ctypes.data - array[0].ctypes.data) % mmap.PAGESIZE == 0
    assert pages.give_back(0)
    assert (array[0] == 0).all()
    assert (array[1] == 1).all()
