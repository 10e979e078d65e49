"""A streamed answer is broken between words, however its pieces are cut."""

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from shoal.cli.wrap import Wrapped

TEXT = st.text(st.sampled_from("ab é \n-水ー"), max_size=80)


def wrapped(pieces: list[str], width: int | None) -> str:
    out = io.StringIO()
    wrap = Wrapped(out.write, width)
    for piece in pieces:
        wrap.push(piece)
    wrap.flush()
    return out.getvalue()


def test_lines_end_between_words() -> None:
    assert (
        wrapped(["The sky is blue beca", "use light scat", "ters."], 12) == "The sky is\nblue because\nlight\nscatters."
    )


def test_a_word_longer_than_a_line_is_left_to_the_terminal() -> None:
    assert wrapped(["see https://example.org/a/b/c now"], 10) == "see\nhttps://example.org/a/b/c\nnow"


def test_where_output_goes_to_a_file_nothing_is_changed() -> None:
    assert wrapped(["a long line ", "that stays "], None) == "a long line that stays "


@given(st.lists(TEXT), st.integers(4, 20))
def test_pieces_do_not_matter_and_no_line_of_short_words_is_too_wide(pieces: list[str], width: int) -> None:
    text = "".join(pieces)
    out = wrapped(pieces, width)

    assert out == wrapped([text], width)
    assert out.split() == text.split() or any(c in text for c in "水ー")
    assert "".join(out.split()) == "".join(text.split())
    for line in out.splitlines():
        assert cell_len(line.strip()) <= width or " " not in line.strip()
