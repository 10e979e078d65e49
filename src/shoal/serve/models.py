"""`/v1/models`: what is served."""

from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from shoal.serve.openai_answers import ModelCard, ModelList
from shoal.serve.ports import Node, ServedModel


def model_routes(node: Node) -> list[HTTPRouteHandler]:
    """Handlers that list the served models."""

    @get("/v1/models", summary="Served models", tags=["OpenAI"])
    async def list_models() -> ModelList:
        return ModelList(data=[model_card(model) for model in node.deployments.served()])

    # A deployment's name may hold slashes (`org/model`), so the rest of the path is the name.
    @get("/v1/models/{name:path}", summary="One served model", tags=["OpenAI"])
    async def one_model(name: FromPath[str]) -> ModelCard:
        return model_card(node.deployments.get(name.removeprefix("/")))

    return [list_models, one_model]


def model_card(model: ServedModel) -> ModelCard:
    """What the API tells about *model*."""
    return ModelCard(
        id=model.name,
        created=model.created_unix_s,
        kind=model.spec.kind.value,
        architecture=model.spec.architecture,
        licence=model.spec.licence,
        context_tokens=model.spec.context_tokens,
        embeddings=model.encoder is not None,
    )
