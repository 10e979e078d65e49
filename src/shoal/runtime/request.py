"""Requests and answers as the serving core sees them: token ids and tensors, never text or JSON."""

from enum import StrEnum

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal.ids import DeploymentId, RequestId
from shoal.runtime.grammar import Grammar

Array = NDArray[np.generic]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a token is chosen from its logits; the defaults choose the most likely one.

    Order of application: logit bias, repetition penalty (over prompt and output), presence and frequency penalties
    (over output), temperature, top-k, top-p, min-p, draw.  `temperature` 0 (below 1e-6) is greedy.  The draw is a function of
    (logits, `seed`, position) alone (ADR 8).
    """

    temperature: float = 0.0
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    logprobs: int | None = None
    """None: no log-probabilities; n: of the chosen token and the n most likely ones."""


class Priority(StrEnum):
    """Somebody waits for an interactive answer; batch work takes what is left."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Continue a prompt.  Stop strings are the gateway's business: it cancels when it has seen one."""

    request: RequestId
    deployment: DeploymentId
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: tuple[int, ...] = ()
    """End of sequence; the token that ends the answer is not delivered."""
    ignore_eos: bool = False
    """True: neither `stop_token_ids` nor the model's own end tokens end the answer."""
    grammar: Grammar | None = None
    """What the answer must look like; None: anything."""
    priority: Priority = Priority.INTERACTIVE
    deadline_s: float | None = None
    """The answer must be complete so long after the first stage received the request; relative, since no two clocks agree."""
    reproducible: bool = False
    """The same request must give the same answer again: nothing may depend on how busy the machines are."""
    admitted: bool = False
    """It was let in before, by a pipeline that is lost: it is not sent away for a crowd."""
    resume: tuple[int, ...] = ()
    """The answer begins with these, which were drawn elsewhere; they count among `max_tokens` and are not said again."""
    predicted: tuple[int, ...] = ()
    """What the answer might be; wrong predictions cost time and change nothing."""


class FinishReason(StrEnum):
    """Why an answer ended, in the OpenAI API's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Natural log-probability of a token before temperature and filters."""

    token: int
    logprob: float


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One token of an answer; `position` counts from the start of the prompt."""

    token: int
    position: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


class OutputDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of an answer.  The last one of a request carries `finish`, and `error` (a code and a text) if it failed.

    `retry_after_s` says when to come again, where that is known.
    """

    request: RequestId
    tokens: tuple[SampledToken, ...] = ()
    finish: FinishReason | None = None
    error_code: str = ""
    error: str = ""
    constrained: bool = False
    """The tokens follow the request's grammar; False from stages that know none."""
    drafted: int = 0
    """Ids that were guessed in the lap that gave `tokens`, and those of them that were right."""
    accepted: int = 0
    cached: int = 0
    """With the first tokens: so many positions of the prompt were not computed, but found in the cache."""
    retry_after_s: float | None = None


class InferRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Run a plain model or an encoder once; `tensors` maps input names to arrays."""

    request: RequestId
    deployment: DeploymentId
    tensors: dict[str, Array]


class InferResult(msgspec.Struct, frozen=True, kw_only=True):
    """Its outputs by name."""

    request: RequestId
    tensors: dict[str, Array]
