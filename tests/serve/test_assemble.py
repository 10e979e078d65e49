"""Laws of text assembly: what a caller reads does not depend on how tokens arrive."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.request import FinishReason, OutputDelta, SampledToken
from shoal.serve.assemble import Assembler, Piece, cut_at_stop

letters = st.text(alphabet="ab", max_size=30)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3).map(tuple)
texts = st.one_of(letters, st.text(alphabet="aé漢🐟\n", max_size=20))


class Bytes:
    """A detokenizer of one token per byte, written for clarity."""

    def __init__(self) -> None:
        self.held = b""

    def push(self, token: int) -> str:
        self.held += bytes([token])
        try:
            text = self.held.decode()
        except UnicodeDecodeError:
            return ""
        self.held = b""
        return text

    def flush(self) -> str:
        return self.held.decode(errors="replace")


def read_by_character(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The rule as an observer would apply it: the specification."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


def deltas_of(data: bytes, sizes: list[int]) -> list[OutputDelta]:
    tokens = [SampledToken(token=b, position=i, logprob=-float(i)) for i, b in enumerate(data)]
    deltas, at = [], 0
    for size in [*sizes, len(tokens)]:
        deltas.append(OutputDelta(request=RequestId("r"), tokens=tuple(tokens[at : at + size])))
        at += size
    return [*deltas, OutputDelta(request=RequestId("r"), finish=FinishReason.LENGTH)]


def read(deltas: list[OutputDelta], stops: tuple[str, ...]) -> list[Piece]:
    assembler, pieces = Assembler(detokenizer=Bytes(), stops=stops), []
    for delta in deltas:
        pieces.append(assembler.push(delta))
        if pieces[-1].finish is not None:
            break
    return pieces


@given(texts, stops, st.lists(st.integers(0, 5), max_size=20))
def test_the_text_is_what_an_observer_reads_however_the_tokens_arrive(
    text: str, stops: tuple[str, ...], sizes: list[int]
) -> None:
    pieces = read(deltas_of(text.encode(), sizes), stops)

    expected, stopped = read_by_character(text, stops)
    assert "".join(p.text for p in pieces) == expected
    assert pieces[-1].finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)


@given(texts, stops, st.lists(st.integers(0, 5), max_size=20))
def test_shown_tokens_are_those_whose_text_is_shown_each_once_and_in_order(
    text: str, stops: tuple[str, ...], sizes: list[int]
) -> None:
    pieces = read(deltas_of(text.encode(), sizes), stops)

    shown = [t for p in pieces for t in p.tokens]
    visible = "".join(p.text for p in pieces)
    assert [t.token.position for t in shown] == list(range(len(shown)))
    assert bytes(t.token.token for t in shown) == visible.encode()
    assert all(visible[t.offset :].encode()[:1] for t in shown)


@given(texts, stops, st.lists(st.integers(0, 5), max_size=20))
def test_nothing_is_taken_back(text: str, stops: tuple[str, ...], sizes: list[int]) -> None:
    """At every moment the text shown so far begins the final text."""
    final, _ = read_by_character(text, stops)
    seen = ""
    for piece in read(deltas_of(text.encode(), sizes), stops):
        seen += piece.text
        assert final.startswith(seen)


@given(letters, stops)
def test_only_the_possible_beginning_of_a_stop_string_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    cut = cut_at_stop(text, stops)

    if not cut.stopped:
        assert cut.shown + cut.held == text
        assert cut.held == "" or any(stop.startswith(cut.held) for stop in stops)


def test_an_incomplete_character_at_the_end_becomes_the_replacement_character() -> None:
    pieces = read(deltas_of("né".encode()[:-1], [1, 1]), ())

    assert "".join(p.text for p in pieces) == "n\ufffd"
    assert len([t for p in pieces for t in p.tokens]) == 2


def test_a_piece_compares_as_a_value() -> None:
    assert Piece() == msgspec.structs.replace(Piece(text="x"), text="")
