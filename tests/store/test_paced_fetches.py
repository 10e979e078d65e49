"""Fetches leave room on links that answers travel on: by a clock that moves only when somebody asks or sleeps."""

from typing import Any

import pytest

from shoal.clock import ManualClock
from shoal.store.chunk import digest_of, ref_of
from shoal.store.memory import MemoryTier
from shoal.store.pace import FAST, GENTLE, PIECE_BYTES, Pacer
from shoal.transport.bus import Bus

Room = Any  # of conftest

CHUNK_BYTES = 1000
CHUNKS = [bytes([i]) * CHUNK_BYTES for i in range(50)]


class SlowBus:
    """Each question takes *answer_s* of the clock; keeps how many bytes were asked for when."""

    def __init__(self, bus: Bus, clock: ManualClock, answer_s: float = 0.0) -> None:
        self._bus = bus
        self._clock = clock
        self._answer_s = answer_s
        self.asked: list[float] = []

    def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
        self.asked.append(self._clock.now_s())
        self._clock.advance(self._answer_s)
        return self._bus.query(key, payload, timeout_s=timeout_s)


def holding(*chunks: bytes) -> MemoryTier:
    tier = MemoryTier()
    for data in chunks:
        tier.put(digest_of(data), data)
    return tier


def test_many_small_chunks_keep_the_limit_together(room: Room) -> None:
    clock = ManualClock()
    bus = SlowBus(room.bus, clock)
    pacer = Pacer(bytes_per_s=500, clock=clock, sleep=clock.advance)
    node = room.serve("full", holding(*CHUNKS))

    room.fetcher(bus, pacer).chunks(map(ref_of, CHUNKS), [node])

    assert bus.asked == [pytest.approx(2.0 * i) for i in range(50)]


def test_a_limit_holds_from_one_fetch_to_the_next(room: Room) -> None:
    clock = ManualClock()
    bus = SlowBus(room.bus, clock)
    fetcher = room.fetcher(bus, Pacer(bytes_per_s=500, clock=clock, sleep=clock.advance))
    node = room.serve("full", holding(*CHUNKS))

    for data in CHUNKS[:3]:
        fetcher.chunks([ref_of(data)], [node])

    assert bus.asked == [0.0, 2.0, 4.0]


def test_time_in_which_nothing_was_asked_is_not_saved_up(room: Room) -> None:
    clock = ManualClock()
    bus = SlowBus(room.bus, clock)
    fetcher = room.fetcher(bus, Pacer(bytes_per_s=500, clock=clock, sleep=clock.advance))
    node = room.serve("full", holding(*CHUNKS))
    fetcher.chunks([ref_of(CHUNKS[0])], [node])
    clock.advance(1000.0)

    fetcher.chunks(map(ref_of, CHUNKS[1:4]), [node])

    assert bus.asked == [0.0, 1000.0, 1002.0, 1004.0]


def test_while_models_are_served_the_link_is_free_half_of_the_time(room: Room) -> None:
    clock = ManualClock()
    bus = SlowBus(room.bus, clock, answer_s=0.5)
    pacer = Pacer(yields=lambda: True, clock=clock, sleep=clock.advance)
    node = room.serve("full", holding(*CHUNKS))

    room.fetcher(bus, pacer).chunks(map(ref_of, CHUNKS), [node])

    assert bus.asked == [pytest.approx(float(i)) for i in range(50)]


def test_nothing_is_held_back_while_nobody_is_served_and_no_limit_is_set(room: Room) -> None:
    clock, slept = ManualClock(), []
    pacer = Pacer(clock=clock, sleep=slept.append)
    node = room.serve("full", holding(*CHUNKS))

    room.fetcher(SlowBus(room.bus, clock, answer_s=0.5), pacer).chunks(map(ref_of, CHUNKS), [node])

    assert slept == []


def test_a_fetch_turns_gentle_when_a_model_begins_to_be_served_and_back(room: Room) -> None:
    clock, served = ManualClock(), [False]
    pacer = Pacer(yields=lambda: served[0], clock=clock, sleep=clock.advance)
    data = bytes(range(256)) * (PIECE_BYTES // 32)  # eight full pieces
    node, arrived = room.serve("full", holding(data)), []

    def note(size_bytes: int) -> None:
        arrived.append(size_bytes)
        served[0] = len(arrived) in range(1, 4)

    room.fetcher(SlowBus(room.bus, clock), pacer).chunks([ref_of(data)], [node], arrived=note)

    assert arrived[:4] == [16 << 10, 16 << 10, 8 << 10, 16 << 10]
    assert max(arrived[4:]) == FAST.piece_bytes
    assert sum(arrived) == len(data)


class Wire:
    """A link of a rate and a round trip, that one piece after another takes."""

    def __init__(self, bus: Bus, clock: ManualClock, bytes_per_s: float, rtt_s: float) -> None:
        self._bus = bus
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._rtt_s = rtt_s
        self.wire_s: list[float] = []

    def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
        answer = self._bus.query(key, payload, timeout_s=timeout_s)
        self.wire_s.append(len(answer) / self._bytes_per_s)
        self._clock.advance(self._rtt_s + self.wire_s[-1])
        return answer


@pytest.mark.parametrize("rtt_s", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("mbit", [1, 10, 50, 1000])
def test_beside_a_served_model_a_piece_is_as_long_on_the_wire_on_any_link(room: Room, mbit: int, rtt_s: float) -> None:
    clock = ManualClock()
    wire = Wire(room.bus, clock, mbit * 1e6 / 8, rtt_s)
    data = bytes(range(256)) * (PIECE_BYTES // 64)
    node = room.serve("full", holding(data))

    room.fetcher(wire, Pacer(yields=lambda: True, clock=clock, sleep=clock.advance)).chunks([ref_of(data)], [node])

    assert max(wire.wire_s) < 0.07
    assert mbit == 1 or sum(wire.wire_s) / len(wire.wire_s) > min(0.006, GENTLE.piece_bytes * 8 / mbit / 1e6 / 2)


def test_a_source_that_is_further_away_than_the_last_one_is_not_taken_for_slow(room: Room) -> None:
    clock = ManualClock()
    near, far = (Wire(room.bus, clock, 1e9, rtt_s) for rtt_s in (0.001, 0.3))
    pacer = Pacer(yields=lambda: True, clock=clock, sleep=clock.advance)
    first, second = (bytes([n]) * (1 << 20) for n in (1, 2))
    node = room.serve("full", holding(first, second))

    room.fetcher(near, pacer).chunks([ref_of(first)], [node])
    room.fetcher(far, pacer).chunks([ref_of(second)], [node])

    assert pacer.window() == GENTLE
