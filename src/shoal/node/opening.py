"""From a deployment that serves to what a gateway answers with: its pipeline, its tokenizer, and what may be asked of it."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import anyio
import anyio.to_thread
import msgspec

from shoal.clock import Clock
from shoal.errors import UnavailableError
from shoal.fleet.report import ShardId
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.view import DeploymentStatus
from shoal.ids import DeploymentId, Digest, RequestId
from shoal.model.codec import ModelCodec
from shoal.model.spec import ModelKind, ModelSpec
from shoal.node.artifacts import Artifact, Artifacts
from shoal.node.foretold import Foretold
from shoal.node.heap import give_back_memory
from shoal.node.pipeline import AnswerDesk, Pipeline
from shoal.node.routed import RoutedExecutor
from shoal.plan.problem import Plan, RequestShape
from shoal.runtime.executor.staged import StagedExecutor
from shoal.serve.ports import EncoderIO, ServedModel
from shoal.store.home import Store, read_file


@dataclass(frozen=True, slots=True)
class Opened:
    """A deployment by one plan: `executor` asks its pipeline, `served` whatever pipeline the deployment has by then."""

    status: DeploymentStatus
    pipeline: Pipeline
    served: ServedModel
    executor: StagedExecutor
    probing: anyio.Lock = field(default_factory=anyio.Lock)


@dataclass(slots=True)
class Opening:
    """Opens deployments, one at a time.  `way` gives the pipeline to ask when a request is sent,
    `stands` says whether a deployment is wanted, `resumed` hears of answers that go on elsewhere, `using` of requests;
    tokenizers are kept.
    """

    store: Store
    artifacts: Artifacts
    desk: AnswerDesk
    clock: Clock
    unix_s: Callable[[], float]
    way: Callable[[DeploymentId, float | None], Awaitable[StagedExecutor]]
    stands: Callable[[DeploymentId, int], bool]
    resumed: Callable[[RequestId, int], None]
    using: Callable[[DeploymentId], AbstractContextManager[None]]
    codecs: dict[Digest, ModelCodec | None] = field(default_factory=dict)

    def open(self, status: DeploymentStatus) -> Opened:
        """Blocks: run it on a thread."""
        deployment = status.deployment
        spec, answer = deployment.spec, deployment.answer
        if not isinstance(answer, Plan):
            raise UnavailableError(f"{spec.deployment} has no plan")
        served = self.served(spec, answer.shape)
        shard = ShardId(deployment=spec.deployment, plan_epoch=deployment.plan_epoch, stage=0)
        foretold = Foretold(answer, self.clock)
        pipeline = Pipeline(self.desk, spec.deployment, answer.stages[0].node, shard, foretold=foretold)
        return Opened(status, pipeline, served, StagedExecutor(client=pipeline))

    def served(self, spec: DeploymentSpec, shape: RequestShape) -> ServedModel:
        """What may be asked of a deployment, loaded or not.  Blocks: run it on a thread."""
        artifact = self.artifacts.open(spec.manifest)
        model = artifact.manifest.spec
        if model.kind is ModelKind.CAUSAL_LM:
            # Requests are checked against what the pipeline can hold, not against what the model was trained for.
            context = min(model.context_tokens or shape.context_tokens, shape.context_tokens)
            model = _with_context(artifact, context)
        return ServedModel(
            name=spec.deployment,
            spec=model,
            executor=RoutedExecutor(
                partial(self.way, spec.deployment),
                self.clock,
                partial(self.stands, spec.deployment, spec.generation),
                self.resumed,
                partial(self.using, spec.deployment),
            ),
            codec=self._codec(artifact),
            encoder=_encoder(artifact),
            created_unix_s=int(self.unix_s()),
        )

    async def keep_codecs(self, wanted: set[Digest]) -> None:
        """Forget the tokenizers of all other models."""
        kept = {digest: codec for digest, codec in self.codecs.items() if digest in wanted}
        dropped, self.codecs = len(self.codecs) - len(kept), kept
        if dropped:
            await anyio.to_thread.run_sync(give_back_memory)

    def _codec(self, artifact: Artifact) -> ModelCodec | None:
        if artifact.digest not in self.codecs:
            self.codecs[artifact.digest] = self._read_codec(artifact)
        return self.codecs[artifact.digest]

    def _read_codec(self, artifact: Artifact) -> ModelCodec | None:
        files = {f.name: read_file(self.store.chunks, artifact.manifest, f.name) for f in artifact.manifest.files}
        present = {name: data for name, data in files.items() if data is not None}
        return ModelCodec.from_files(present, self.unix_s) if "tokenizer.json" in present else None


def _with_context(artifact: Artifact, context_tokens: int) -> ModelSpec:
    return msgspec.structs.replace(artifact.manifest.spec, context_tokens=context_tokens)


def _encoder(artifact: Artifact) -> EncoderIO | None:
    if artifact.manifest.spec.kind is not ModelKind.ENCODER:
        return None
    return EncoderIO(
        inputs=tuple(b.name for b in artifact.blocks[0].inputs), output=artifact.blocks[-1].outputs[0].name
    )
