"""A worker process: one shard, one engine session, one place in a pipeline (ADR 6).

Its life: read the spec from standard input, load, listen (`ready`), be wired, serve; it ends when standard input closes, which
happens when its agent says so and also when the agent dies.  Reports go to the agent over the control session.
"""

import os
import secrets
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec
from structlog.typing import FilteringBoundLogger

from shoal.errors import ShoalError
from shoal.fleet.report import ShardState
from shoal.node.artifacts import Artifact, load_shard, open_artifact
from shoal.node.drafting import DraftModel, load_draft
from shoal.node.grammars import grammars_of
from shoal.node.reporter import Reporter
from shoal.node.stage_loop import StageLoop, Stopped
from shoal.node.stage_work import Bench, listen, work
from shoal.node.weather import Slowness
from shoal.node.worker_spec import WorkerSpec
from shoal.observe.log import set_up_logs
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.backend.roles import forms_of
from shoal.runtime.backend.throttled import Throttled
from shoal.runtime.ports import Backend, Session
from shoal.runtime.scheduler import SchedulerSettings
from shoal.runtime.settings import Recovery, StageSettings, TensorForm, credits_for
from shoal.store.home import Store, open_store
from shoal.threads import SystemThreads
from shoal.transport.bus import Bus
from shoal.transport.zenoh import open_control


def stage_settings(spec: WorkerSpec, artifact: Artifact, takes: tuple[TensorForm, ...]) -> StageSettings:
    """The machine's settings for this place in the pipeline."""
    model = artifact.manifest.spec
    return StageSettings(
        plan_epoch=spec.shard.plan_epoch,
        index=spec.shard.stage,
        stages=spec.stages,
        slots=spec.slots,
        context_tokens=spec.context_tokens,
        vocabulary=model.vocabulary,
        eos_token_ids=model.eos_token_ids,
        takes=takes,
        run=secrets.randbits(32),
        birth=spec.birth,
        recovery=spec.recovery,
        speculation=spec.speculation,
        activations=spec.activations,
        cache_tokens=spec.cache_tokens,
        credits=credits_for(spec.in_flight),
        scheduler=SchedulerSettings(in_flight=spec.in_flight, replays_exactly=spec.recovery is Recovery.EXACT),
    )


def serve(spec: WorkerSpec, control: Bus, backend: Backend, store: Store, log: FilteringBoundLogger) -> None:
    """Load the shard and work until the agent closes our input."""
    life = _Life()
    threading.Thread(target=life.watch, name="input", daemon=True).start()
    reporter = Reporter(spec=spec, control=control, threads=SystemThreads())
    reporter.start()
    try:
        artifact = open_artifact(store, spec.manifest)
        session, takes = _load(spec, store, artifact, backend)
        draft = _draft(spec, store, backend, log)
        inbound = listen(spec.data_listen)
    except ShoalError as error:
        reporter.tell(ShardState.FAILED, error)
        raise
    settings = stage_settings(spec, artifact, takes)
    if draft is not None:
        settings = msgspec.structs.replace(settings, draft_tokens=draft.context_tokens)
    grammars = grammars_of(store, artifact) if settings.is_last else None
    bench = Bench(spec=spec, control=control, reporter=reporter, log=log, grammars=grammars, draft=draft)
    work(bench, session, settings, inbound, life.begin)


def _load(
    spec: WorkerSpec, store: Store, artifact: Artifact, backend: Backend
) -> tuple[Session, tuple[TensorForm, ...]]:
    """The shard in its engine, and what must come with its frames."""
    shard = load_shard(
        store,
        artifact,
        (spec.start, spec.stop),
        slots=spec.slots,
        context_tokens=spec.context_tokens,
        threads=spec.threads,
    )
    return backend.load(shard), forms_of(shard.graph)


def _draft(spec: WorkerSpec, store: Store, backend: Backend, log: FilteringBoundLogger) -> DraftModel | None:
    """What guesses beside the stage; it goes on without where that cannot be loaded."""
    if not spec.draft:
        return None
    try:
        return load_draft(
            store, backend, spec.draft, slots=spec.slots, context_tokens=spec.context_tokens, threads=spec.threads
        )
    except ShoalError as error:
        log.warning("draft.not_loaded", shard=str(spec.shard), error=error.message)
        return None


@dataclass(slots=True)
class _Life:
    """As long as standard input is open; then the loop is stopped, and the process ends hard if that does not help."""

    loop: StageLoop | None = None

    def begin(self, loop: StageLoop) -> None:
        self.loop = loop

    def watch(self) -> None:
        sys.stdin.read()
        if self.loop is not None:  # else it still loads: nothing is lost by ending at once
            self.loop.inbox.put(Stopped())
            threading.Event().wait(2.5)
        os._exit(0)


def make_backend(spec: WorkerSpec) -> Backend:
    """The engine for this machine, slowed down as its weather says where the spec emulates one."""
    engine: Backend = OnnxBackend()
    emulated = spec.slowdown > 1 or spec.links
    return Throttled(engine, slowdown=Slowness(Path(spec.home), spec.slowdown)) if emulated else engine


def main() -> None:
    """Entry point of the process."""
    spec = msgspec.json.decode(sys.stdin.readline(), type=WorkerSpec)
    log = set_up_logs(sys.stderr)
    try:
        control = open_control(spec.agent_locator)
        store = open_store(Path(spec.home))
        try:
            serve(spec, control, make_backend(spec), store, log)
        finally:
            control.close()
    except ShoalError as error:
        log.error("worker.failed", shard=str(spec.shard), error=str(error))  # noqa: TRY400 the error says it all; a traceback helps nobody
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
