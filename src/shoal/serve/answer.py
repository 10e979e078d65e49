"""Answering a job: run its requests on the executor, measure, cancel at once when nobody listens any more.

Deltas are pushed to the caller's connection from the tasks that read the executor, all inside one task group that lives as long as
the HTTP request.  An async generator handed to the web framework was rejected: when the connection drops while the framework
sends, the generator is left to the garbage collector, and the slot of the request with it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import msgspec

from shoal.errors import DeadlineExceededError, OverloadedError, ShardLostError, ShoalError, UnavailableError
from shoal.fleet.faults import Fault, restore
from shoal.runtime.request import FinishReason, GenerateRequest, OutputDelta
from shoal.serve.assemble import Assembler, Piece
from shoal.serve.closing import closed_after
from shoal.serve.job import Job
from shoal.serve.openai_answers import CompletionDetails, PromptDetails, Usage
from shoal.serve.ports import Limits, Node
from shoal.serve.retries import Retries
from shoal.serve.tool_reader import ToolReader, call_id

Emit = Callable[[int, Piece], Awaitable[None]]
"""Takes a choice's index and its news."""
GRACE_S = 1.0
"""So much later than the pipeline the gateway notices that a request's own time has passed."""


@dataclass(slots=True, kw_only=True)
class Door:
    """The gateway's state: how many requests are being answered.  Owned by the event loop that serves."""

    node: Node
    limits: Limits
    in_flight: int = 0
    retries: Retries = field(init=False)
    """Answers to requests that may be sent again."""

    def __post_init__(self) -> None:
        self.retries = Retries(self.node.clock)

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Count a request while it is answered; raises OverloadedError, and DeadlineExceededError after `limits.answer_s`."""
        if self.in_flight >= self.limits.in_flight:
            raise OverloadedError(
                f"{self.in_flight} requests are being answered already, the limit", hint="try again in a moment"
            )
        self.in_flight += 1
        try:
            with anyio.fail_after(self.limits.answer_s):
                yield
        except TimeoutError:
            raise DeadlineExceededError(
                f"no complete answer within {self.limits.answer_s:g} s", hint="ask for fewer tokens, or for n = 1"
            ) from None
        finally:
            self.in_flight -= 1


async def answer(door: Door, job: Job, emit: Emit) -> Usage:
    """Generate every choice of *job*, telling *emit* the news; raises what the executor raises."""
    arrived_s = door.node.clock.now_s()
    readers = [_Reader(door=door, job=job, index=i, emit=emit, last_s=arrived_s) for i in range(len(job.requests))]
    limiter = anyio.CapacityLimiter(door.limits.parallel_choices)
    outcome = FinishReason.CANCELLED.value
    try:
        async with anyio.create_task_group() as group:
            for reader in readers:
                group.start_soon(_limited, limiter, reader)
        outcome = readers[-1].finish.value
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        outcome = error.code if isinstance(error, ShoalError) else "internal_error"
        raise error from None
    finally:
        tokens = sum(reader.tokens for reader in readers)
        accepted, rejected = (sum(values) for values in zip(*(r.guesses for r in readers), strict=True))
        door.node.metrics.guessed(job.model.name, accepted, rejected)
        cached = sum(reader.cached for reader in readers)
        door.node.metrics.reused(job.model.name, cached)
        door.node.metrics.answered(job.model.name, outcome, job.prompt_tokens, tokens)
    return Usage(
        prompt_tokens=job.prompt_tokens,
        completion_tokens=tokens,
        total_tokens=job.prompt_tokens + tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
        completion_tokens_details=CompletionDetails(
            accepted_prediction_tokens=accepted, rejected_prediction_tokens=rejected
        ),
    )


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf: what went wrong before the rest was cancelled for it."""
    first = group.exceptions[0]
    return first_error(first) if isinstance(first, BaseExceptionGroup) else first


@dataclass(slots=True, kw_only=True)
class _Reader:
    """Reads one choice's deltas."""

    door: Door
    job: Job
    index: int
    emit: Emit
    last_s: float
    tokens: int = 0
    finish: FinishReason = FinishReason.CANCELLED
    guesses: tuple[int, int] = (0, 0)
    """Guessed tokens that were right, and that were wrong."""
    cached: int = 0
    """Tokens of the prompt that were found in the cache."""

    async def read(self, request: GenerateRequest) -> None:
        codec, marks = self.job.codec, self.job.tools.wanted
        assembler = Assembler(
            detokenizer=codec.detokenizer(continues=self.job.continues, marks=marks), stops=self.job.stops
        )
        calls = ToolReader(form=codec.tool_format, new_id=self._new_call) if marks else None
        async with closed_after(self.job.model.executor.generate(request)) as deltas:
            async for delta in deltas:
                self._measure(delta)
                _check(delta)
                piece = assembler.push(delta)
                piece = calls.read(piece) if calls is not None else piece
                self.tokens = assembler.tokens
                if piece != Piece(called=piece.called):
                    await self.emit(self.index, piece)
                if piece.finish is not None:
                    self.finish = piece.finish
                    return
            raise ShardLostError("the answer broke off without a reason", hint="send the request again")

    def _new_call(self) -> str:
        return call_id(self.door.node.draw(), self.job.codec.tool_format.id_chars)

    def _measure(self, delta: OutputDelta) -> None:
        if not delta.tokens:
            return
        name, metrics, now_s = self.job.model.name, self.door.node.metrics, self.door.node.clock.now_s()
        self.cached += delta.cached
        right, wrong = self.guesses
        self.guesses = (right + delta.accepted, wrong + delta.drafted - delta.accepted)
        rest = len(delta.tokens)
        elapsed_s, self.last_s = now_s - self.last_s, now_s
        if self.tokens == 0:
            metrics.first_token(name, elapsed_s)
            rest, elapsed_s = rest - 1, 0.0
        for _ in range(rest):
            metrics.output_token(name, elapsed_s / rest)


async def _limited(limiter: anyio.CapacityLimiter, reader: _Reader) -> None:
    arrived_s = reader.last_s
    async with limiter:
        now_s = reader.door.node.clock.now_s()
        reader.last_s = reader.last_s if reader.index == 0 else now_s
        request = reader.job.requests[reader.index]
        if request.deadline_s is None:
            await reader.read(request)
        else:
            await _in_time(reader, request, request.deadline_s - (now_s - arrived_s))


async def _in_time(reader: _Reader, request: GenerateRequest, left_s: float) -> None:
    """Read an answer of which *left_s* of its time are left.

    The pipeline ends it by itself, with better words, unless no pipeline could be asked: a second later we do.
    """
    late = DeadlineExceededError(
        f"no complete answer within the {request.deadline_s:g} s that were given", hint="give it more time"
    )
    if left_s <= 0:
        raise late
    try:
        with anyio.fail_after(left_s + GRACE_S):
            await reader.read(msgspec.structs.replace(request, deadline_s=left_s))
    except TimeoutError:
        raise late from None


def _check(delta: OutputDelta) -> None:
    """Raise what a failed delta says."""
    if delta.finish is FinishReason.ERROR:
        raise restore(
            Fault(
                message=delta.error or "the model failed",
                code=delta.error_code or None,
                type="server_error",
                retry_after_s=delta.retry_after_s,
            )
        )
    if delta.finish is FinishReason.CANCELLED:
        raise UnavailableError("the request was cancelled because its deployment stops", hint="send it again")
