"""The error tree survives a wire."""

import msgspec
import pytest

from shoal.errors import InvalidRequestError, ShoalError, UnavailableError, UntrustedError
from shoal.fleet.faults import Fault, describe, restore


def tree(cls: type[ShoalError] = ShoalError) -> list[type[ShoalError]]:
    return [cls] + [leaf for sub in cls.__subclasses__() for leaf in tree(sub)]


@pytest.mark.parametrize("cls", tree(), ids=lambda c: c.code)
def test_every_error_comes_back_as_itself(cls: type[ShoalError]) -> None:
    error = cls("3 of 4 are missing", hint="add one")
    if isinstance(error, InvalidRequestError):
        error.param = "model"
    if isinstance(error, UnavailableError):
        error.retry_after_s = 2.5

    back = restore(msgspec.json.decode(msgspec.json.encode(describe(error)), type=Fault))

    assert type(back) is cls
    assert vars(back) == vars(error)


def test_codes_name_one_class_each() -> None:
    codes = [cls.code for cls in tree()]

    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("invalid_request_error", InvalidRequestError), ("unavailable_error", UnavailableError), ("untrusted_error", UntrustedError),
     ("server_error", ShoalError)],
)  # fmt: skip
def test_a_code_of_a_newer_release_still_says_whose_move_it_is(kind: str, cls: type[ShoalError]) -> None:
    assert type(restore(Fault(message="x", type=kind, code="of_tomorrow"))) is cls
