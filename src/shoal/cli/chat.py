"""shoal chat: talk with a deployed model in the terminal."""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, NamedTuple

import httpx
import typer
from rich.console import Console

from shoal.cli.connect import URL_HELP, api_key, find_url
from shoal.cli.main import complain
from shoal.cli.wrap import Wrapped
from shoal.client import Shoal
from shoal.client.calls import failure, unreachable
from shoal.errors import ShoalError, UnknownModelError
from shoal.fleet.faults import Fault, restore

Message = dict[str, str]


def chat(
    model: Annotated[str, typer.Argument(help="The deployment; may be left out if there is one.")] = "",
    *,
    message: Annotated[str, typer.Option("--message", "-m", help="Say this, print the answer, and end.")] = "",
    system: Annotated[str, typer.Option(help="Instructions for the model.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.2,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    url: Annotated[str, typer.Option(help=URL_HELP)] = "",
) -> None:
    """Talk with a deployed model; an empty line or Ctrl-D ends, Ctrl-C ends an answer, /clear starts over."""
    where = find_url(url)
    name = model or _only_deployment(where)
    options = {"model": name, "temperature": temperature, "max_tokens": max_tokens}
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    console = Console()
    if not message:
        console.print(f"[dim]talking with {name}; an empty line ends, /clear starts over[/]")
    while True:
        said = message or _read(console)
        if not said:
            return
        if said == "/clear":
            messages = list(begin)
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            answer = show(stream(where, {**options, "messages": asked, "stream": True}), console)
        except ShoalError as error:
            if message:
                raise
            complain(error.message, error.hint)  # the conversation goes on as it was before this question
            continue
        if answer.finish == LENGTH and console.is_terminal:
            console.print(f"[dim]... ({max_tokens} tokens, the limit; --max-tokens sets it)[/]")
        if message and answer.finish == INTERRUPTED:
            raise KeyboardInterrupt
        if message:
            return
        messages = [*asked, {"role": "assistant", "content": answer.text}]


LENGTH, INTERRUPTED = "length", "interrupted"


class Piece(NamedTuple):
    """News of a streamed answer, or all of it; `finish` is the reason of its end, as OpenAI's API words it, or `INTERRUPTED`."""

    text: str
    finish: str = ""


def show(pieces: Iterable[Piece], console: Console) -> Piece:
    """Print an answer as it comes, broken between words on a terminal, and return it; Ctrl-C ends the answer and nothing else."""
    text, finish = "", ""
    wrapped = Wrapped(sys.stdout.write, console.width if console.is_terminal else None)
    try:
        for piece in pieces:
            text, finish = text + piece.text, piece.finish or finish
            wrapped.push(piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        finish = INTERRUPTED
    finally:
        wrapped.flush()
        sys.stdout.write("\n" if text else "")
        sys.stdout.flush()
    return Piece(text, finish)


def stream(url: str, body: dict[str, object]) -> Iterator[Piece]:
    """The pieces of a streamed chat completion; raises ShoalError as the SDK does."""
    headers = {"Authorization": f"Bearer {key}"} if (key := api_key()) else {}
    try:
        with (
            httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(30.0, read=600.0)) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise failure("/v1/chat/completions", response.status_code, response.headers, response.read())
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield from _piece(json.loads(line.removeprefix("data: ")))
    except httpx.RequestError as error:
        raise unreachable(url, error) from error


def _piece(event: dict[str, object]) -> Iterator[Piece]:
    match event:
        case {"error": {"message": str(message), **more}}:
            raise restore(Fault(message=message, code=str(more.get("code")), hint=str(more.get("hint", ""))))
        case {"choices": [{"delta": {**delta}, **rest}, *_]}:
            yield Piece(text=str(delta.get("content") or ""), finish=str(rest.get("finish_reason") or ""))
        case _:
            return


def _read(console: Console) -> str:
    try:
        return console.input("[bold cyan]> [/]").strip()
    except EOFError:
        return ""


def _only_deployment(url: str) -> str:
    with Shoal(url, api_key=api_key()) as shoal:
        names = [view.name for view in shoal.deployments()]
    if len(names) != 1:
        raise UnknownModelError(
            f"{len(names)} models are deployed: {', '.join(names)}" if names else "no model is deployed",
            hint="say which one: shoal chat NAME" if names else "`shoal serve MODEL` deploys one",
        )
    return names[0]
