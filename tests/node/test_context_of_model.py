"""How much context a deployment may ask of a model."""

import pytest

from shoal.errors import InvalidRequestError
from shoal.model.spec import ModelKind, ModelSpec
from shoal.node.fleet_api import fitting
from shoal.plan.problem import RequestShape


def model(context_tokens: int) -> ModelSpec:
    return ModelSpec(name="tiny", kind=ModelKind.CAUSAL_LM, architecture="llama", context_tokens=context_tokens)


def test_what_fits_is_kept() -> None:
    shape = RequestShape(context_tokens=512)

    assert fitting(shape, model(8192)) == shape
    assert fitting(shape, model(0)) == shape


def test_the_default_is_cut_to_a_small_model() -> None:
    shape = fitting(RequestShape(), model(128))

    assert (shape.context_tokens, shape.tokens_in + shape.tokens_out) == (128, 128)


def test_a_wish_beyond_the_model_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidRequestError, match="8192 tokens, 200000 are asked"):
        fitting(RequestShape(context_tokens=200_000), model(8192))
