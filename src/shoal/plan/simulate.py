"""An event-driven simulation of a chain under a closed loop: the judge of the cost model, and of plans on fleets not at hand.

It runs what a deployment runs, frame by frame in virtual time.  A stream sends its micro-batch's prompts one after another, each
in chunks, then steps them together; a token goes back to the first stage before the next step starts; when the last token is at
the source the stream asks again.  As in the runtime's scheduler, at most `in_flight` frames are in the pipeline at once, the
others wait at the first stage in the order in which they came.  Servers take frames in the order of arrival.

Nothing here knows the planner's formulas (an import contract holds that): what it finds about overlap, waiting and shared media
is found by letting it happen.  Memory, pins and prices are not its business.

One event per visit to a server: a frame that arrives takes the server when it is free, which with service in order of
arrival is known at once.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from shoal.errors import InvalidRequestError
from shoal.plan.line import Line, Route, Shard, build_line
from shoal.plan.problem import Problem, RequestShape
from shoal.plan.simulated import Busy, Load, Noise, Simulated, exactly

WARM_ROUNDS = 2
LEAST_ROUNDS = 2
"""Then at least one stream is measured from asking to its last token."""


def simulate(problem: Problem, stages: Sequence[Shard], load: Load, noise: Noise = exactly) -> Simulated:
    """Run the chain *stages* under *load*; raises InvalidRequestError when they are no chain of *problem*."""
    if load.streams < 1 or load.requests < 1:
        raise InvalidRequestError(
            f"{load.streams} streams and {load.requests} requests are nothing to simulate", hint="ask for 1 or more"
        )
    loop = _Loop(shape=problem.shape, line=build_line(problem, stages), noise=noise)
    rounds = -(-load.requests // (load.streams * problem.shape.batch))
    return loop.run(load.streams, max(LEAST_ROUNDS, rounds))


class _Kind(Enum):
    PROMPT = auto()
    """Ids on their way to the first stage."""
    CHUNK = auto()
    """Rows of a prompt that give no token."""
    FIRST = auto()
    """The last rows of a prompt."""
    STEP = auto()
    FED = auto()
    """Back at the first stage, without a token in it."""
    TOKEN_FED = auto()
    DELIVERED = auto()


@dataclass(slots=True)
class _Stream:
    """A micro-batch, from its first prompt to its last token."""

    prompts: int = 0
    """Answered by their first token."""
    fed: int = 0
    """First tokens that are back at the first stage."""
    steps: int = 0
    """Tokens of each sequence that the source has."""
    sent_at_s: list[float] = field(default_factory=list)
    last_token_s: float = 0.0


@dataclass(slots=True)
class _Frame:
    kind: _Kind
    stream: _Stream
    route: Route
    at: int = 0


@dataclass(slots=True)
class _Seen:
    """Measurements of requests that were answered after the first rounds."""

    first_token_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)


class _Loop:
    """Virtual time, servers, and what is on its way."""

    def __init__(self, shape: RequestShape, line: Line, noise: Noise) -> None:
        servers = len(line.devices) + len(line.links)
        self.shape, self.line, self.noise = shape, line, noise
        self.noisy = noise is not exactly
        self.free_at_s, self.busy_s, self.uses = [0.0] * servers, [0.0] * servers, [0] * servers
        self.arrived_s = [0.0] * line.lanes
        self.events: list[tuple[float, int, _Frame]] = []
        self.sequence = 0
        self.waiting: deque[_Frame] = deque()
        self.room = shape.in_flight
        self.finished_s: list[float] = []
        self.warm_micro_batches = 0
        self.busy_before_s = list(self.busy_s)
        self.seen = _Seen()

    def run(self, streams: int, rounds: int) -> Simulated:
        """All streams, until *rounds* times their number of micro-batches were answered after the first rounds."""
        self.warm_micro_batches = WARM_ROUNDS * streams
        wanted = self.warm_micro_batches + rounds * streams
        for _ in range(streams):
            self._ask(_Stream(), 0.0)
        while len(self.finished_s) < wanted:
            now_s, _, frame = heapq.heappop(self.events)
            if frame.at < len(frame.route):
                self._visit(frame, now_s)
            else:
                self._arrived(frame, now_s)
        return self._result(wanted)

    def _visit(self, frame: _Frame, now_s: float) -> None:
        server, lane, service_s, delay_s, at_once = frame.route[frame.at]
        if self.noisy:
            factor = self.noise(server, self.uses[server])
            self.uses[server] += 1
            service_s, delay_s = service_s * factor, delay_s * factor
        done_s = self.free_at_s[server] = max(now_s, self.free_at_s[server]) + service_s
        self.busy_s[server] += service_s
        there_s = (now_s + service_s if at_once else done_s) + delay_s
        if self.noisy:
            # A connection keeps its order: a frame that was delayed less does not overtake.
            there_s = self.arrived_s[lane] = max(there_s, self.arrived_s[lane])
        frame.at += 1
        self._at(there_s, frame)

    def _at(self, time_s: float, frame: _Frame) -> None:
        self.sequence += 1
        heapq.heappush(self.events, (time_s, self.sequence, frame))

    def _arrived(self, frame: _Frame, now_s: float) -> None:
        match frame.kind:
            case _Kind.PROMPT:
                self._chunks(frame.stream, now_s)
            case _Kind.CHUNK:
                self._send(_Kind.FED, frame.stream, self.line.feed, now_s)
            case _Kind.FIRST | _Kind.STEP:
                self._answer(frame.stream, now_s)
            case _Kind.FED:
                self._make_room(now_s)
            case _Kind.TOKEN_FED:
                self._make_room(now_s)
                if self.line.deliver is None:
                    self._delivered(frame.stream, now_s)
                self._fed(frame.stream, now_s)
            case _Kind.DELIVERED:
                self._delivered(frame.stream, now_s)

    def _send(self, kind: _Kind, stream: _Stream, route: Route, now_s: float) -> None:
        self._at(now_s, _Frame(kind, stream, route))

    def _ask(self, stream: _Stream, now_s: float) -> None:
        stream.sent_at_s.append(now_s)
        self._send(_Kind.PROMPT, stream, self.line.enter, now_s)

    def _chunks(self, stream: _Stream, now_s: float) -> None:
        *before, last = self.line.chunks
        for route in before:
            self._admit(_Frame(_Kind.CHUNK, stream, route), now_s)
        self._admit(_Frame(_Kind.FIRST, stream, last), now_s)

    def _admit(self, frame: _Frame, now_s: float) -> None:
        if self.room:
            self.room -= 1
            self._at(now_s, frame)
        else:
            self.waiting.append(frame)

    def _make_room(self, now_s: float) -> None:
        if self.waiting:
            self._at(now_s, self.waiting.popleft())
        else:
            self.room += 1

    def _answer(self, stream: _Stream, now_s: float) -> None:
        """The last stage has a token: both who needs it for the next step and who asked get it."""
        if self.line.deliver is not None:
            self._send(_Kind.DELIVERED, stream, self.line.deliver, now_s)
        self._send(_Kind.TOKEN_FED, stream, self.line.feed, now_s)

    def _fed(self, stream: _Stream, now_s: float) -> None:
        stream.fed += 1
        # One frame per prompt, then one per step; the last token starts no step.
        steps_started = stream.fed - self.shape.batch
        if 0 <= steps_started < self.shape.tokens_out - 1:
            self._admit(_Frame(_Kind.STEP, stream, self.line.step), now_s)

    def _delivered(self, stream: _Stream, now_s: float) -> None:
        if stream.prompts < self.shape.batch:
            if self._measuring():
                self.seen.first_token_s.append(now_s - stream.sent_at_s[stream.prompts])
            stream.prompts += 1
            if stream.prompts < self.shape.batch:
                self._ask(stream, now_s)
                return
        elif self._measuring():
            self.seen.between_s.append(now_s - stream.last_token_s)
        stream.last_token_s = now_s
        stream.steps += 1
        if stream.steps == self.shape.tokens_out:
            self._finished(stream, now_s)

    def _measuring(self) -> bool:
        return len(self.finished_s) >= self.warm_micro_batches

    def _finished(self, stream: _Stream, now_s: float) -> None:
        if self._measuring():
            self.seen.latency_s += [now_s - sent_s for sent_s in stream.sent_at_s]
        self.finished_s.append(now_s)
        if len(self.finished_s) == self.warm_micro_batches:
            self.busy_before_s = list(self.busy_s)
        self._ask(_Stream(), now_s)

    def _result(self, wanted: int) -> Simulated:
        batch, tokens_out, seen = self.shape.batch, self.shape.tokens_out, self.seen
        span_s = self.finished_s[-1] - self.finished_s[self.warm_micro_batches - 1]
        tokens = (wanted - self.warm_micro_batches) * batch * tokens_out
        return Simulated(
            requests=wanted * batch,
            tokens=wanted * batch * tokens_out,
            duration_s=self.finished_s[-1],
            tokens_per_s=tokens / span_s if span_s else 0.0,
            time_to_first_token_s=_rank(seen.first_token_s, 0.5),
            time_to_first_token_p95_s=_rank(seen.first_token_s, 0.95),
            time_per_output_token_s=_rank(seen.between_s, 0.5) if seen.between_s else None,
            time_per_output_token_p95_s=_rank(seen.between_s, 0.95) if seen.between_s else None,
            latency_s=_rank(seen.latency_s, 0.5),
            devices=self._shares(self.line.devices, span_s),
            links=self._shares(self.line.links, span_s),
        )

    def _shares(self, servers: dict[int, str], span_s: float) -> tuple[Busy, ...]:
        def share(server: int) -> float:
            # A visit is booked when it starts, so the ends of the measured part can be off by one of them.
            return min(1.0, (self.busy_s[server] - self.busy_before_s[server]) / span_s) if span_s else 0.0

        return tuple(Busy(name=name, share=share(server)) for server, name in servers.items())


def _rank(values: Sequence[float], q: float) -> float:
    """The nearest-rank quantile."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]
