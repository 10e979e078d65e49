"""From the news of an answer to the items and events of the Responses API: in the order that its clients rely on.

An item begins (`output_item.added`), grows, and is done before the next one begins; the response is created first and completed
last, and every event is numbered.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from shoal.runtime.request import FinishReason
from shoal.serve.assemble import CallNews, Piece
from shoal.serve.openai_answers import Usage
from shoal.serve.openai_responses import (
    IncompleteDetails,
    InputDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    Response,
    ResponseEvent,
    ResponseUsage,
    Status,
)


@dataclass(slots=True)
class ResponseWriter:
    """One response; owned by the task that answers.  `new_id` makes ids of items with the prefix that it is given."""

    blank: Response
    new_id: Callable[[str], str]
    done: list[OutputItem] = field(default_factory=list)
    _open: OutputItem | None = None
    _call: int = -1
    """Which call is open."""
    _events: int = 0
    _finish: FinishReason | None = None

    def begin(self) -> Iterator[ResponseEvent]:
        """Before anything is known."""
        yield self._event("response.created", response=self.blank)
        yield self._event("response.in_progress", response=self.blank)

    def news(self, piece: Piece) -> Iterator[ResponseEvent]:
        """What *piece* adds."""
        if piece.text:
            yield from self._say(piece.text)
        for call in piece.calls:
            yield from self._tell(call)
        if piece.finish is not None:
            self._finish = piece.finish
            yield from self._close()

    def end(self, usage: Usage) -> Iterator[ResponseEvent]:
        """The whole response, after everything."""
        whole = self.whole(usage)
        yield self._event(f"response.{whole.status}", response=whole)

    def whole(self, usage: Usage) -> Response:
        """The response as it is sent to whoever does not stream."""
        cut = self._finish is FinishReason.LENGTH
        told = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
        return msgspec.structs.replace(
            self.blank,
            status="incomplete" if cut else "completed",
            output=list(self.done),
            usage=told,
            incomplete_details=IncompleteDetails() if cut else None,
        )

    def _say(self, text: str) -> Iterator[ResponseEvent]:
        if not isinstance(self._open, OutputMessage):
            yield from self._close()
            self._open = OutputMessage(id=self.new_id("msg"), status="in_progress", content=[])
            yield self._event("response.output_item.added", item=self._open, output_index=len(self.done))
            self._open = msgspec.structs.replace(self._open, content=[OutputText(text="")])
            yield self._of_part("response.content_part.added", part=OutputText(text=""))
        message = self._open
        assert isinstance(message, OutputMessage)
        self._open = msgspec.structs.replace(message, content=[OutputText(text=message.content[0].text + text)])
        yield self._of_part("response.output_text.delta", delta=text, logprobs=[])

    def _tell(self, news: CallNews) -> Iterator[ResponseEvent]:
        if not isinstance(self._open, OutputCall) or self._call != news.index:
            yield from self._close()
            self._call = news.index
            self._open = OutputCall(
                id=self.new_id("fc"), call_id=news.id, name=news.name, arguments="", status="in_progress"
            )
            yield self._event("response.output_item.added", item=self._open, output_index=len(self.done))
        call = self._open
        assert isinstance(call, OutputCall)
        if news.arguments:
            self._open = msgspec.structs.replace(call, arguments=call.arguments + news.arguments)
            yield self._of_item("response.function_call_arguments.delta", delta=news.arguments)

    def _close(self) -> Iterator[ResponseEvent]:
        """End the open item, if there is one."""
        status: Status = "incomplete" if self._finish is FinishReason.LENGTH else "completed"
        match self._open:
            case OutputMessage(content=[part]) as message:
                yield self._of_part("response.output_text.done", text=part.text, logprobs=[])
                yield self._of_part("response.content_part.done", part=part)
                item: OutputItem = msgspec.structs.replace(message, status=status)
            case OutputCall(arguments=arguments, name=name) as call:
                yield self._of_item("response.function_call_arguments.done", arguments=arguments, name=name)
                item = msgspec.structs.replace(call, status=status)
            case _:
                return
        yield self._event("response.output_item.done", item=item, output_index=len(self.done))
        self.done.append(item)
        self._open = None

    def _of_item(self, kind: str, **more: object) -> ResponseEvent:
        assert self._open is not None
        return self._event(kind, item_id=self._open.id, output_index=len(self.done), **more)

    def _of_part(self, kind: str, **more: object) -> ResponseEvent:
        return self._of_item(kind, content_index=0, **more)

    def _event(self, kind: str, **more: object) -> ResponseEvent:
        self._events += 1
        return ResponseEvent(type=kind, sequence_number=self._events - 1, **more)  # type: ignore[arg-type]
