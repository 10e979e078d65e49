"""`/v1/embeddings`: texts to vectors by a served encoder."""

import base64
from collections.abc import Sequence

import numpy as np
from anyio import to_thread
from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from numpy.typing import NDArray

from shoal.errors import ContextLengthError, InvalidRequestError
from shoal.ids import RequestId
from shoal.model.spec import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from shoal.runtime.request import Array, InferRequest
from shoal.serve.answer import Door
from shoal.serve.openai_answers import Embedding, EmbeddingList, EmbeddingsUsage
from shoal.serve.openai_requests import EMBEDDINGS_RULES, EmbeddingsRequest
from shoal.serve.ports import EncoderIO, ServedModel, TextCodec
from shoal.serve.strict import strict
from shoal.serve.text import encode_prompts, new_stamp, split_prompts

Vector = NDArray[np.float32]
TOKEN_TYPE_IDS = "token_type_ids"  # noqa: S105 - an input's name


def embedding_routes(door: Door) -> list[HTTPRouteHandler]:
    """The handler of `/v1/embeddings`."""

    @post(
        "/v1/embeddings",
        status_code=200,
        dto=strict(EmbeddingsRequest, EMBEDDINGS_RULES),
        summary="Texts to vectors",
        tags=["OpenAI"],
    )
    async def embeddings(data: JSONBody[EmbeddingsRequest]) -> EmbeddingList:
        model = door.node.deployments.get(data.model)
        codec, encoder = _encoder_of(model)
        inputs = split_prompts(data.input, "input")
        if len(inputs) > door.limits.embedding_inputs:
            raise InvalidRequestError(
                f"{len(inputs)} inputs, {door.limits.embedding_inputs} are allowed",
                hint="send several requests",
                param="input",
            )
        prompts = await to_thread.run_sync(encode_prompts, codec, inputs)
        _check_lengths(prompts, model)
        request = new_stamp(door, "embd").id
        async with door.admitted():
            vectors = [await _embed(model, encoder, p, f"{request}-{i}") for i, p in enumerate(prompts)]
        tokens = sum(map(len, prompts))
        return EmbeddingList(
            data=[Embedding(index=i, embedding=_told(v, data.encoding_format)) for i, v in enumerate(vectors)],
            model=model.name,
            usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
        )

    return [embeddings]


def encoder_tensors(ids: Sequence[int], inputs: Sequence[str]) -> dict[str, Array]:
    """What an encoder is fed for one text of T ids: the inputs it has among the four that BERT's family uses, int64 `[1, T]`."""
    row = np.asarray([ids], dtype=np.int64)
    known: dict[str, Array] = {
        INPUT_IDS: row,
        ATTENTION_MASK: np.ones_like(row),
        TOKEN_TYPE_IDS: np.zeros_like(row),
        POSITION_IDS: np.arange(row.shape[1], dtype=np.int64)[None],
    }
    return {name: known[name] for name in inputs if name in known}


def pool(hidden: Array, pooling: str | None, *, normalise: bool) -> Vector:
    """Token vectors `[1, T, H]` of one text to its embedding `[H]`: mean or first token, to unit length when *normalise*.

    (Reimers and Gurevych, "Sentence-BERT", 2019, section 3.)  There is no padding, so the mean needs no mask.
    """
    rows = hidden[0].astype(np.float32)
    vector = rows[0] if pooling == "cls" else rows.mean(axis=0)
    if normalise:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return np.asarray(vector, dtype=np.float32)


def _encoder_of(model: ServedModel) -> tuple[TextCodec, EncoderIO]:
    if model.codec is None or model.encoder is None:
        raise InvalidRequestError(
            f"model {model.name} gives no embeddings (it is of kind {model.spec.kind.value})",
            hint="GET /v1/models shows which do",
            param="model",
        )
    return model.codec, model.encoder


def _check_lengths(prompts: Sequence[Sequence[int]], model: ServedModel) -> None:
    limit, vocabulary = model.spec.context_tokens, model.spec.vocabulary
    for position, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidRequestError(f"input {position} has no tokens", param="input")
        if vocabulary and not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InvalidRequestError(f"input {position} has a token id outside [0, {vocabulary})", param="input")
        if limit and len(prompt) > limit:
            raise ContextLengthError(
                f"input {position} has {len(prompt)} tokens, the model reads {limit}", hint="split it", param="input"
            )


async def _embed(model: ServedModel, encoder: EncoderIO, ids: Sequence[int], request: str) -> Vector:
    tensors = encoder_tensors(ids, encoder.inputs)
    result = await model.executor.infer(
        InferRequest(request=RequestId(request), deployment=model.name, tensors=tensors)
    )
    return pool(result.tensors[encoder.output], model.spec.pooling, normalise=model.spec.normalise)


def _told(vector: Vector, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector]
