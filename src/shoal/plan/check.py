"""Is a problem well formed?  Solvers trust it afterwards; whether it can be solved is theirs to say."""

import math
from collections import Counter
from collections.abc import Iterable

from shoal.errors import InvalidRequestError
from shoal.plan.problem import (
    BatchTimes,
    BlockSpec,
    Choose,
    Cloud,
    DeviceSpec,
    Limits,
    LinkSpec,
    Problem,
    RequestShape,
    SharedTensor,
)
from shoal.plan.written import WORTH

LARGEST = 1e18
"""No figure is larger: beyond that sums lose their seconds, and products leave the numbers that there are."""
SLOWEST_BYTES_PER_S = 1e-6
MOST_STREAMS = 1024
LARGEST_TABLE = 60_000_000
"""Devices x devices x cuts that solvers keep at once: 480 MB for each of a handful of tables."""


def check(problem: Problem) -> None:
    """Raise InvalidRequestError naming the first field that makes no sense."""
    if not problem.blocks:
        raise fault("the problem has no blocks", "blocks")
    if not problem.devices:
        raise fault("the problem has no devices", "devices")
    unique([device.node for device in problem.devices], "device")
    unique([f"{link.source} to {link.target}" for link in problem.links], "link")
    _check_shape(problem.shape)
    for index, block in enumerate(problem.blocks):
        sizes = (block.weights_bytes, block.kv_bytes_per_token, block.output_bytes_per_token, block.output_bytes_fixed,
                 block.load_peak_bytes, block.workspace_bytes)  # fmt: skip
        smaller = (size for one in block.smaller for size in (one.bytes_per_token, one.bytes_fixed))
        not_negative((*sizes, *smaller), f"blocks[{index}]", f"a size of block {index} ({block.name})")
        _check_smaller(block, index)
    for tensor in problem.shared:
        _check_shared(problem, tensor)
    for device in problem.devices:
        untimed = device.node in problem.exclude and not device.decode_s and not device.prefill_s
        _check_device(device, 0 if untimed else len(problem.blocks))
    for link in problem.links:
        if not _sound(link):  # a large fleet has 100,000 of them
            _check_link(link)
    _check_limits(problem.limits)
    _check_choose(problem.choose, problem.shape)
    if problem.cloud is not None:
        check_cloud(problem.cloud)
    _check_pins(problem)
    _check_counts(problem)
    _check_size(problem)


def _check_smaller(block: BlockSpec, index: int) -> None:
    """Only what is known to lose how much may be chosen, and in that order."""
    codecs = [one.codec for one in block.smaller]
    if codecs != [codec for codec in WORTH if codec in codecs]:
        raise fault(
            f"block {index} ({block.name}) may be written as {', '.join(codecs)}",
            f"blocks[{index}].smaller",
            hint=f"those that may be chosen are, in this order, {', '.join(WORTH)}",
        )


def _check_shape(shape: RequestShape) -> None:
    for name in ("tokens_in", "tokens_out", "slots", "in_flight", "batch", "prefill_chunk_tokens"):
        if getattr(shape, name) < 1:
            raise fault(f"shape.{name} is {getattr(shape, name)}; it must be at least 1", f"shape.{name}")
        not_negative((getattr(shape, name),), f"shape.{name}", f"shape.{name}")
    not_negative((shape.context_tokens,), "shape.context_tokens", "shape.context_tokens")
    not_negative((shape.cache_tokens,), "shape.cache_tokens", "shape.cache_tokens")
    if 0 < shape.cache_tokens < shape.context_tokens:
        raise fault(
            f"a cache of {shape.cache_tokens} tokens does not hold one context of {shape.context_tokens}",
            "shape.cache_tokens",
            hint=f"set it to {shape.context_tokens} or more, or to 0 for a whole context in each slot",
        )
    live = shape.in_flight * shape.batch
    if live > shape.slots:
        raise fault(
            f"{shape.in_flight} micro-batches of {shape.batch} in flight need {live} slots, the shape has {shape.slots}",
            "shape.in_flight",
            hint=f"set slots to {live} or more",
        )
    if 0 < shape.context_tokens < shape.tokens_in + shape.tokens_out:
        raise fault(
            f"{shape.tokens_in} tokens in and {shape.tokens_out} out do not fit in a context of {shape.context_tokens}",
            "shape.context_tokens",
            hint=f"set the context to {shape.tokens_in + shape.tokens_out} or more",
        )


def _check_device(device: DeviceSpec, blocks: int) -> None:
    for name in ("decode_s", "prefill_s"):
        times = getattr(device, name)
        if len(times) != blocks:
            raise fault(f"{device.node} has {len(times)} times in {name} for {blocks} blocks", f"devices.{name}")
        not_negative(times, f"devices.{name}", f"a time in {name} of {device.node}")
    for timed in device.batched:
        _check_batch(device, timed, blocks)
    unique([str(timed.batch) for timed in device.batched], f"batch of {device.node}:")
    rates = (device.active_watts, device.price_per_hour, device.joules_limit or 0.0)
    not_negative(rates, "devices", f"a rate or limit of {device.node}")
    sizes = (device.memory_budget_bytes, device.memory_promised_bytes, device.fixed_bytes)
    not_negative((*sizes, device.weights_factor, device.step_overhead_s), "devices", f"a figure of {device.node}")


def _check_batch(device: DeviceSpec, timed: BatchTimes, blocks: int) -> None:
    if timed.batch < 2:
        raise fault(f"{device.node} has times for a batch of {timed.batch}; decode_s is that of 1", "devices.batched")
    if len(timed.decode_s) != blocks:
        raise fault(
            f"{device.node} has {len(timed.decode_s)} times for a batch of {timed.batch} and {blocks} blocks",
            "devices.batched",
        )
    not_negative(timed.decode_s, "devices.batched", f"a time for a batch of {timed.batch} of {device.node}")


def _check_shared(problem: Problem, tensor: SharedTensor) -> None:
    not_negative((tensor.size_bytes,), "shared.size_bytes", "the size of a shared tensor")
    unique([str(block) for block in tensor.blocks], "block of a shared tensor:")
    for block in tensor.blocks:
        if not 0 <= block < len(problem.blocks):
            raise fault(f"a shared tensor names block {block}, the model has {len(problem.blocks)}", "shared.blocks")
        held = sum(other.size_bytes for other in problem.shared if block in other.blocks)
        if held > problem.blocks[block].weights_bytes:
            raise fault(
                f"block {block} has {problem.blocks[block].weights_bytes} bytes of weights, {held} of them shared",
                "shared.size_bytes",
                hint="weights_bytes counts shared tensors, too",
            )


def _sound(link: LinkSpec) -> bool:
    """Whether `_check_link` has nothing to say."""
    return (
        0 <= link.latency_s <= LARGEST
        and SLOWEST_BYTES_PER_S <= link.bytes_per_s <= LARGEST
        and 0 <= link.joules_per_byte <= LARGEST
        and 0 <= link.price_per_byte <= LARGEST
        and link.source != link.target
    )


def _check_link(link: LinkSpec) -> None:
    name = f"the link from {link.source} to {link.target}"
    not_negative((link.latency_s,), "links.latency_s", f"latency_s of {name}")
    not_negative((link.joules_per_byte, link.price_per_byte), "links", f"a charge of {name}")
    if link.source == link.target:
        raise fault(f"{name} leads nowhere", "links")
    if not (math.isfinite(link.bytes_per_s) and link.bytes_per_s > 0):
        raise fault(f"bytes_per_s of {name} is {link.bytes_per_s}; it must be above 0", "links.bytes_per_s")
    if not SLOWEST_BYTES_PER_S <= link.bytes_per_s <= LARGEST:
        raise fault(
            f"bytes_per_s of {name} is {link.bytes_per_s}; it must lie between {SLOWEST_BYTES_PER_S} and {LARGEST:g}",
            "links.bytes_per_s",
            hint="leave out a link that carries nothing",
        )


def _check_limits(limits: Limits) -> None:
    for name in limits.__struct_fields__:
        value = getattr(limits, name)
        if value is not None:
            not_negative((value,), f"limits.{name}", f"limits.{name}")


def _check_choose(choose: Choose, shape: RequestShape) -> None:
    not_negative((choose.in_flight, choose.slots), "choose", "choose.in_flight or choose.slots")
    if any(batch < 1 for batch in choose.batch):
        raise fault(f"choose.batch names {min(choose.batch)}; a micro-batch has at least 1 sequence", "choose.batch")
    most = max(choose.in_flight, choose.slots, *choose.batch, len(choose.batch))
    if most > MOST_STREAMS:
        raise fault(f"choose goes up to {most}; at most {MOST_STREAMS} are weighed", "choose")
    least = min(choose.batch, default=shape.batch) * (1 if choose.in_flight else shape.in_flight)
    if least > (choose.slots or shape.slots):
        raise fault(
            f"the smallest choice needs {least} slots, {choose.slots or shape.slots} are allowed",
            "choose.slots",
            hint=f"set choose.slots to {least} or more, or allow smaller batches",
        )


def check_cloud(cloud: Cloud) -> None:
    """Raise InvalidRequestError naming the first figure that makes no sense."""
    for name in cloud.__struct_fields__:
        value = getattr(cloud, name)
        if isinstance(value, int | float):
            not_negative((value,), f"cloud.{name}", f"cloud.{name}")


def _check_pins(problem: Problem) -> None:
    known = {device.node for device in problem.devices}
    wanted = {pin.block: pin.node for pin in problem.pins}
    if problem.pin_first:
        wanted.setdefault(0, problem.source)
    if problem.pin_last:
        wanted.setdefault(len(problem.blocks) - 1, problem.source)
    for pin in problem.pins:
        if not 0 <= pin.block < len(problem.blocks):
            raise fault(f"block {pin.block} is pinned, the model has blocks 0 to {len(problem.blocks) - 1}", "pins")
        if wanted[pin.block] != pin.node:
            raise fault(f"block {pin.block} is pinned to both {pin.node} and {wanted[pin.block]}", "pins")
    if problem.pin_first and wanted[0] != problem.source:
        raise fault(
            f"block 0 stays on the source {problem.source}, yet it is pinned to {wanted[0]}",
            "pins",
            hint="drop the pin, make that node the source, or set pin_first to false",
        )
    if problem.pin_last and wanted[len(problem.blocks) - 1] != problem.source:
        raise fault(
            "the last block stays on the source, yet it is pinned elsewhere", "pins", hint="drop one of the two"
        )
    for block, node in wanted.items():
        if node not in known or node in problem.exclude:
            raise fault(
                f"block {block} belongs on {node}, which is {'excluded' if node in known else 'no device here'}", "pins"
            )


def _check_counts(problem: Problem) -> None:
    known = {device.node for device in problem.devices}
    for node in problem.require:
        if node not in known or node in problem.exclude:
            said = "is excluded as well" if node in known else "is no device here"
            raise fault(f"{node} must take part, but {said}", "require", hint="drop one of the two")
    for name in ("max_stages", "stages_exactly"):
        not_negative((getattr(problem, name),), name, name)


def _check_size(problem: Problem) -> None:
    """Solvers that hold every hop would take all memory for a moment, or for hours; so they say so at once."""
    devices, cuts = len(problem.devices) - len(set(problem.exclude)), len(problem.blocks) + 1
    if devices * devices * cuts > LARGEST_TABLE:
        most = math.isqrt(LARGEST_TABLE // cuts)
        raise fault(
            f"{devices} devices are too many for {cuts - 1} blocks: at most {most} are planned for at once",
            "devices",
            hint="exclude those that are slow or far, or plan for one site at a time",
        )


def unique(names: list[str], what: str) -> None:
    """Raise InvalidRequestError when a name is given twice."""
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise fault(f"{what} {name} is given {count} times", f"{what}s")


def not_negative(values: Iterable[float], param: str, what: str) -> None:
    """Raise InvalidRequestError unless all are numbers from 0 to `LARGEST`."""
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise fault(f"{what} is {value}; it must be 0 or more", param)
        if value > LARGEST:
            raise fault(f"{what} is {value:g}; it must be at most {LARGEST:g}", param)


def fault(message: str, param: str, *, hint: str = "") -> InvalidRequestError:
    """An error about the field *param*."""
    return InvalidRequestError(message, param=param, hint=hint)
