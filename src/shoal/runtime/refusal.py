"""Which requests no pipeline can answer, and how a requester is told that something went wrong."""

from shoal.errors import ContextLengthError, InvalidRequestError, ShoalError, UnavailableError
from shoal.ids import RequestId
from shoal.runtime.effects import Emit, EmitResult
from shoal.runtime.frames import Failure, InferDone, InferStep, Submit
from shoal.runtime.grammar import check_grammar
from shoal.runtime.request import FinishReason, GenerateRequest, OutputDelta
from shoal.runtime.sampling import check_sampling
from shoal.runtime.settings import StageSettings


def check_request(request: GenerateRequest, settings: StageSettings) -> None:
    """Raise InvalidRequestError or ContextLengthError, naming the field, unless the pipeline can answer *request*."""
    if not settings.slots:
        raise InvalidRequestError(
            "this model does not generate text", hint="ask for embeddings or infer instead", param="model"
        )
    length, limit = len(request.prompt), settings.context_tokens
    if not length:
        raise InvalidRequestError("the prompt is empty", hint="send at least one token", param="prompt")
    if request.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {request.max_tokens}; at least 1 is needed", param="max_tokens")
    if request.deadline_s is not None and not request.deadline_s > 0:  # NaN is refused, too
        raise InvalidRequestError(
            f"deadline_s is {request.deadline_s:g}", hint="say for how long the answer is of use", param="deadline_s"
        )
    if len(request.resume) >= request.max_tokens:
        raise InvalidRequestError(
            f"an answer of at most {request.max_tokens} tokens cannot go on after {len(request.resume)}",
            param="max_tokens",
        )
    if length + len(request.resume) >= limit > length:
        raise ContextLengthError(f"the answer so far has filled the context of {limit} tokens", param="max_tokens")
    if length >= limit:
        raise ContextLengthError(
            f"the prompt has {length} tokens and the context {limit}", hint="shorten the prompt by at least "
            f"{length - limit + 1} tokens, or serve the model with a longer context", param="prompt"
        )  # fmt: skip
    low, high = min(*request.prompt, *request.resume, request.prompt[0]), max(*request.prompt, *request.resume, 0)
    if low < 0 or (settings.vocabulary and high >= settings.vocabulary):
        raise InvalidRequestError(f"the prompt holds token ids outside [0, {settings.vocabulary})", param="prompt")
    check_sampling(request.sampling, settings.vocabulary)
    check_grammar(request.grammar, ignore_eos=request.ignore_eos)


def refusal(submit: Submit, error: ShoalError) -> Emit:
    """*submit* will not be answered."""
    return Emit(reply_to=submit.reply_to, delta=error_delta(submit.request.request, error))


def error_delta(request: RequestId, error: ShoalError) -> OutputDelta:
    """The end of an answer that *error* ends."""
    again_s = error.retry_after_s if isinstance(error, UnavailableError) else None
    return OutputDelta(
        request=request, finish=FinishReason.ERROR, error_code=error.code, error=str(error), retry_after_s=again_s
    )


def failed(reply_to: str, failure: Failure) -> Emit:
    """The end of an answer that a stage could not go on with."""
    delta = OutputDelta(request=failure.request, finish=FinishReason.ERROR, error_code=failure.code, error=failure.text)
    return Emit(reply_to=reply_to, delta=delta)


def infer_failed(step: InferStep, code: str, text: str) -> EmitResult:
    """The end of an inference that gave nothing."""
    done = InferDone(request=step.request, error_code=code, error=text)
    return EmitResult(reply_to=step.reply_to, done=done, tensors={})
