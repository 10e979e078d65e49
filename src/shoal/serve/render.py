"""News of an answer in OpenAI's words: the two text protocols differ in nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from shoal import __version__
from shoal.errors import ShoalError
from shoal.runtime.request import FinishReason
from shoal.serve.assemble import CallNews, Piece, ShownToken
from shoal.serve.job import Job
from shoal.serve.openai_answers import (
    AnswerCall,
    AnswerFunction,
    AnswerMessage,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatToken,
    Completion,
    Finish,
    TextChoice,
    TextLogprobs,
    TopToken,
    Usage,
)
from shoal.serve.ports import TextCodec
from shoal.serve.tool_reader import whole_calls

FINGERPRINT = f"shoal-{__version__}"


class Renderer(Protocol):
    """A text protocol's shapes."""

    def opening(self, index: int) -> msgspec.Struct | None:
        """The event before a choice's first news, if the protocol has one."""
        ...

    def news(self, index: int, piece: Piece) -> msgspec.Struct:
        """The event for *piece*."""
        ...

    def usage(self, usage: Usage) -> msgspec.Struct:
        """The last event of a stream that was asked to include usage."""
        ...

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> msgspec.Struct:
        """The body of an answer that is not streamed; one complete piece per choice."""
        ...


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """`/v1/chat/completions`."""

    job: Job

    def opening(self, index: int) -> ChatChunk:
        return self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))])

    def news(self, index: int, piece: Piece) -> ChatChunk:
        delta = ChatDelta(content=piece.text or UNSET, tool_calls=[_call_delta(c) for c in piece.calls] or UNSET)
        finish = finish_word(piece.finish, called=piece.called)
        return self._chunk(
            [ChatChunkChoice(index=index, delta=delta, finish_reason=finish, logprobs=self._logprobs(piece))]
        )

    def usage(self, usage: Usage) -> ChatChunk:
        return msgspec.structs.replace(self._chunk([]), usage=usage)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=_message(piece),
                finish_reason=finish_word(piece.finish, called=piece.called) or "stop",
                logprobs=self._logprobs(piece),
            )
            for index, piece in enumerate(pieces)
        ]
        return ChatCompletion(
            id=self.job.id,
            created=self.job.created,
            model=self.job.model.name,
            choices=choices,
            usage=usage,
            system_fingerprint=FINGERPRINT,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self.job.id,
            created=self.job.created,
            model=self.job.model.name,
            choices=choices,
            usage=_no_usage(self.job),
            system_fingerprint=FINGERPRINT,
        )

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if self.job.requests[0].sampling.logprobs is None:
            return None
        return ChatLogprobs(content=[_chat_token(shown, self.job.codec) for shown in piece.tokens])


@dataclass(frozen=True, slots=True)
class CompletionRenderer:
    """`/v1/completions`."""

    job: Job

    def opening(self, index: int) -> None:
        """There is no role to announce."""

    def news(self, index: int, piece: Piece) -> Completion:
        return self._completion([self._choice(index, piece)], _no_usage(self.job))

    def usage(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Completion:
        return self._completion([self._choice(index, piece) for index, piece in enumerate(pieces)], usage)

    def _choice(self, index: int, piece: Piece) -> TextChoice:
        logprobs = None
        if self.job.requests[0].sampling.logprobs is not None:
            logprobs = _text_logprobs(piece.tokens, self.job.codec)
        return TextChoice(index=index, text=piece.text, finish_reason=finish_word(piece.finish), logprobs=logprobs)

    def _completion(self, choices: list[TextChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self.job.id,
            created=self.job.created,
            model=self.job.model.name,
            choices=choices,
            usage=usage,
            system_fingerprint=FINGERPRINT,
        )


def finish_word(finish: FinishReason | None, *, called: bool = False) -> Finish | None:
    """OpenAI's word for an end that is an answer; failures never come here."""
    match finish:
        case None:
            return None
        case FinishReason.STOP:
            return "tool_calls" if called else "stop"
        case FinishReason.LENGTH:
            return "length"
        case FinishReason.CANCELLED | FinishReason.ERROR:
            raise ShoalError(f"an answer that ended with {finish.value} is an error, not an answer")


def joined(pieces: Sequence[Piece]) -> Piece:
    """A choice's news as one piece."""
    return Piece(
        text="".join(p.text for p in pieces),
        tokens=tuple(t for p in pieces for t in p.tokens),
        finish=pieces[-1].finish if pieces else None,
        calls=tuple(whole_calls(tuple(c for p in pieces for c in p.calls))),
        called=any(p.called for p in pieces),
    )


def _message(piece: Piece) -> AnswerMessage:
    calls = [
        AnswerCall(id=call.id, function=AnswerFunction(name=call.name, arguments=call.arguments))
        for call in piece.calls
    ]
    return AnswerMessage(content=piece.text or (None if calls else ""), tool_calls=calls or UNSET)


def _call_delta(news: CallNews) -> CallDelta:
    if not news.id:
        return CallDelta(index=news.index, function=AnswerFunction(arguments=news.arguments))
    function = AnswerFunction(name=news.name, arguments=news.arguments)
    return CallDelta(index=news.index, id=news.id, type="function", function=function)


def _no_usage(job: Job) -> UnsetType | None:
    """Streams with usage carry a null in all events but the last, others do not have the field."""
    return None if job.include_usage else UNSET


def _token_text(raw: bytes) -> str:
    """A token's text; half a character is shown by its bytes, as OpenAI's completions do."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def _chat_token(shown: ShownToken, codec: TextCodec) -> ChatToken:
    top = [_top_token(t.token, t.logprob, codec) for t in shown.token.top]
    own = _top_token(shown.token.token, shown.token.logprob or 0.0, codec)
    return ChatToken(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)


def _top_token(token: int, logprob: float, codec: TextCodec) -> TopToken:
    raw = codec.token_bytes(token)
    return TopToken(token=_token_text(raw), logprob=logprob, bytes=list(raw))


def _text_logprobs(tokens: Sequence[ShownToken], codec: TextCodec) -> TextLogprobs:
    return TextLogprobs(
        tokens=[_token_text(codec.token_bytes(t.token.token)) for t in tokens],
        token_logprobs=[t.token.logprob or 0.0 for t in tokens],
        top_logprobs=[{_token_text(codec.token_bytes(c.token)): c.logprob for c in t.token.top} for t in tokens],
        text_offset=[t.offset for t in tokens],
    )
