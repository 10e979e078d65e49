"""`shoal chat` against a gateway of a few lines: what is asked, what is shown, and what a conversation remembers."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from shoal.cli.chat import INTERRUPTED, Piece, show, stream
from shoal.cli.main import app
from shoal.errors import NodeUnreachableError, ShardLostError


class Gateway:
    """Answers each question with its next script: texts, then an error or a reason to end."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []
        self.scripts: list[list[object]] = []
        self.url = ""

    def events(self) -> Iterator[dict[str, object]]:
        yield {"choices": [{"delta": {"role": "assistant"}}]}
        for said in self.scripts.pop(0):
            match said:
                case str(text):
                    yield {"choices": [{"delta": {"content": text}, "finish_reason": None}]}
                case {"finish": reason}:
                    yield {"choices": [{"delta": {}, "finish_reason": reason}]}
                case _:
                    yield {"error": said}


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    told = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            for event in told.events():
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        told.url = f"http://127.0.0.1:{server.server_port}"
        yield told
        server.shutdown()
        thread.join()


def chat(gateway: Gateway, *flags: str, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["chat", "m", "--url", gateway.url, *flags], input=typed)


def questions(gateway: Gateway) -> list[list[str]]:
    """What each request told the model, oldest first."""
    return [[m["content"] for m in asked["messages"]] for asked in gateway.asked]  # type: ignore[index,union-attr]


LOST = {"message": "worker 7 died", "type": "unavailable_error", "code": "shard_lost", "hint": "try again"}


def test_a_conversation_remembers_until_it_is_cleared_and_ends_with_the_input(gateway: Gateway) -> None:
    gateway.scripts = [["Hel", "lo."], ["Fine."], ["Who?"]]

    done = chat(gateway, "--system", "be kind", typed="hi\nhow are you\n/clear\nstill there?\n")

    assert done.exit_code == 0, done.output
    assert questions(gateway) == [
        ["be kind", "hi"],
        ["be kind", "hi", "Hello.", "how are you"],
        ["be kind", "still there?"],
    ]
    for said in ("Hello.\n", "Fine.\n", "Who?\n"):
        assert said in done.stdout


def test_an_empty_line_ends_it(gateway: Gateway) -> None:
    assert chat(gateway, typed="\nhi\n").exit_code == 0
    assert gateway.asked == []


def test_an_error_in_the_stream_is_told_and_the_conversation_goes_on_as_before_it(gateway: Gateway) -> None:
    gateway.scripts = [["Half an", LOST], ["Whole."]]

    done = chat(gateway, typed="one\ntwo\n")

    assert done.exit_code == 0
    assert "Half an\n" in done.stdout
    assert done.stderr == "error: worker 7 died\nhint: try again\n"
    assert questions(gateway) == [["one"], ["two"]]


def test_a_single_message_prints_the_answer_or_fails_with_the_errors_code(gateway: Gateway) -> None:
    gateway.scripts = [["Fish.", {"finish": "stop"}], [LOST]]

    good = chat(gateway, "-m", "name one", "--max-tokens", "3")
    bad = chat(gateway, "-m", "name one")

    assert (good.exit_code, good.stdout) == (0, "Fish.\n")
    assert gateway.asked[0]["max_tokens"] == 3
    assert bad.exit_code == 69
    assert "worker 7 died" in bad.stderr


def test_a_stream_gives_texts_the_reason_of_its_end_and_errors_of_the_tree(gateway: Gateway) -> None:
    gateway.scripts = [["a", "b", {"finish": "length"}], [LOST]]

    assert list(stream(gateway.url, {})) == [Piece(""), Piece("a"), Piece("b"), Piece("", "length")]
    with pytest.raises(ShardLostError, match="worker 7 died"):
        list(stream(gateway.url, {}))


def test_where_nobody_listens_is_unreachable(gateway: Gateway) -> None:
    with pytest.raises(NodeUnreachableError, match="no gateway answers"):
        list(stream("http://127.0.0.1:9", {}))


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece("Once upon a")
        raise KeyboardInterrupt

    terminal = Console(file=io.StringIO(), force_terminal=True, width=8)

    assert show(pieces(), terminal) == Piece("Once upon a", INTERRUPTED)
    assert capsys.readouterr().out == "Once\nupon a\n"
