"""The models that this node's gateway answers for: follows the coordinator's view, and ends what a lost pipeline cannot.

When a deployment moves, requests that run stay with the pipeline that they were sent to until it has answered them; new ones go to
the next as soon as the view names it, and wait while neither takes any.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import anyio
import anyio.to_thread
from structlog.typing import FilteringBoundLogger

from shoal.clock import Clock
from shoal.errors import InfeasibleError, ShoalError, UnavailableError, UnknownModelError
from shoal.fleet.reconcile import Phase
from shoal.fleet.view import LEASE_S, CoordinatorView, DeploymentStatus
from shoal.fleet.views import ComponentHealth, DeploymentHealth, HealthView, PredictionView
from shoal.ids import DeploymentId, NodeId, RequestId
from shoal.model.catalog import CATALOGUE
from shoal.model.spec import ModelKind
from shoal.node.artifacts import Artifacts
from shoal.node.opening import Opened, Opening
from shoal.node.pipeline import AnswerDesk
from shoal.runtime.executor.staged import StagedExecutor
from shoal.runtime.request import GenerateRequest
from shoal.serve.ports import ServedModel
from shoal.store.home import Store

IDLE_S = 1.0
PROBE_TIMEOUT_S = 1.5
SIGN_S = 4.0
"""A pipeline that works shows a sign of life every 2 s; twice that long is too long."""
HOLD_S = 60.0
"""So long may a request wait while a deployment moves: drain, load and link take a few seconds, on slow devices ten times that."""


@dataclass(slots=True)
class Models:
    """`Deployments` and `Health` of `serve.ports`, from the newest view; belongs to the event loop."""

    me: NodeId
    store: Store
    artifacts: Artifacts
    desk: AnswerDesk
    clock: Clock
    unix_s: Callable[[], float]
    new_id: Callable[[], str]
    log: FilteringBoundLogger
    view: CoordinatorView | None = None
    _heard_s: float | None = None
    """When a coordinator was heard last; None: not since the start."""
    _open: dict[DeploymentId, Opened] = field(default_factory=dict)
    _left: dict[DeploymentId, Opened] = field(default_factory=dict)
    """Pipelines that a deployment has moved from; their running requests go on."""
    _last: dict[DeploymentId, Opened] = field(default_factory=dict)
    """What was open last, of deployments that were not declared anew since."""
    _closed: dict[DeploymentId, str] = field(default_factory=dict)
    """Why those that serve cannot be opened here."""
    _opening: Opening = field(init=False)
    _news: anyio.Event = field(default_factory=anyio.Event)
    _turned: anyio.Event = field(default_factory=anyio.Event)
    """Set, and replaced, when a request that waits should look again."""

    def __post_init__(self) -> None:
        self._opening = Opening(
            self.store, self.artifacts, self.desk, self.clock, self.unix_s, self._way, self._stands, self._resumed
        )

    def hear(self, view: CoordinatorView) -> None:
        """A broadcast; what is older than the newest is ignored."""
        if view.newer_than(self.view):
            self._heard_s = self.clock.now_s()
            self.follow(view)

    def follow(self, view: CoordinatorView) -> None:
        """Make *view* ours; pipelines that it no longer names as serving are broken off at once."""
        self.view = view
        for name, opened in list(self._open.items()):
            status = view.find(name)
            if status is not None and status.phase in _ANSWERING and _epoch(status) == _epoch(opened.status):
                self._open[name] = replace(opened, status=status)
                if opened.status.first_birth not in {0, status.first_birth}:
                    opened.pipeline.break_off("the worker of its first stage is lost")
            else:
                del self._open[name]
                self._leave(name, opened)
        for name, left in list(self._left.items()):
            if not _ends(left, view.find(name)):
                del self._left[name]
                _break_off(left, view.find(name))
        generations = {s.deployment.spec.deployment: s.deployment.spec.generation for s in view.deployments}
        self._last = {n: o for n, o in self._last.items() if generations.get(n) == _epoch(o.status)[0]}
        self._news.set()
        self._turn()

    def any_served(self) -> bool:
        """Whether any model of the fleet answers now, by the newest view.  For any thread."""
        statuses = self.view.deployments if self.view is not None else ()
        return any(status.phase in _ANSWERING - {Phase.MENDING} for status in statuses)

    async def run(self) -> None:
        """Open pipelines that begin to serve, until cancelled; their text is prepared while their engines load."""
        loading: set[tuple[DeploymentId, int, int]] = set()
        while True:
            self._news = anyio.Event()
            statuses = self.view.deployments if self.view is not None else ()
            mine = [s for s in statuses if s.deployment.spec.source == self.me]
            wanted = {s.deployment.spec.manifest for s in mine}
            await self._opening.keep_codecs(wanted)
            for status in mine:
                known = (status.deployment.spec.deployment, *_epoch(status))
                # Not at the first view that says loading: reading a tokenizer would hold up the start of the worker.
                early = status.phase is Phase.LOADING and known in loading
                if (early or status.phase is Phase.SERVING) and status.deployment.spec.deployment not in self._open:
                    await self._try_open(status)
            loading = {(s.deployment.spec.deployment, *_epoch(s)) for s in mine if s.phase is Phase.LOADING}
            await self._news.wait()

    def served(self) -> Sequence[ServedModel]:
        """Models that answer now, by name."""
        return [self._open[name].served for name in sorted(self._open)]

    def get(self, name: str) -> ServedModel:
        """One of them; raises UnknownModelError, InfeasibleError, or UnavailableError while it loads or recovers."""
        opened = self._open.get(DeploymentId(name))
        if opened is not None and self._takes(opened):
            return opened.served
        if self._holds(DeploymentId(name)):
            return self._last[DeploymentId(name)].served
        status = self.view.find(DeploymentId(name)) if self.view is not None else None
        if status is None:
            known = ", ".join(sorted(self._open)) or "none yet"
            raise UnknownModelError(
                f"no model {name!r} is deployed; deployed are: {known}",
                hint=self._way_to(name),
                param="model",
            )
        if status.phase is Phase.REFUSED:
            raise InfeasibleError(f"{name} cannot be placed: {status.reason}", param="model")
        if status.deployment.spec.source != self.me:
            raise UnknownModelError(
                f"this gateway does not answer for {name}",
                hint=f"ask {status.gateway or 'its own gateway'}",
                param="model",
            )
        if status.phase is Phase.SERVING:
            why = self._closed.get(DeploymentId(name), "its tokenizer is being read")
            raise UnavailableError(
                f"{name} cannot be asked yet: {why}", hint="try again in a moment", retry_after_s=2.0
            )
        why = f" ({status.reason})" if status.reason else ""
        raise UnavailableError(f"{name} is {status.phase.value}{why}", hint="try again in a moment", retry_after_s=2.0)

    async def _way(self, name: DeploymentId) -> StagedExecutor:
        """The pipeline to ask; waits while the deployment moves.  Raises as `get` does."""
        with anyio.move_on_after(HOLD_S):
            while True:
                opened = self._open.get(name)
                if opened is not None and (self._takes(opened) or opened.status.phase is Phase.DRAINING):
                    return opened.executor
                if not self._holds(name):
                    break
                with anyio.move_on_after(LEASE_S):  # that no coordinator is heard any more turns nothing
                    await self._turned.wait()
        status = self.view.find(name) if self.view is not None else None
        stands = status.phase.value if status is not None else "stopped"
        raise UnavailableError(f"{name} is {stands}", hint="try again in a moment", retry_after_s=2.0)

    def _stands(self, name: DeploymentId, generation: int) -> bool:
        """Whether an answer may wait for the next pipeline: what it came from is still wanted as it was, and can be had."""
        status = self.view.find(name) if self.view is not None else None
        return status is not None and status.phase is not Phase.REFUSED and _epoch(status)[0] == generation

    def _resumed(self, request: RequestId, tokens: int) -> None:
        self.log.info("answer.resumed", request=request, tokens=tokens)

    def _takes(self, opened: Opened) -> bool:
        """Whether the pipeline takes new requests; one that is to be left does when nobody is there to end the move."""
        silent = self._heard_s is None or self.clock.now_s() - self._heard_s > LEASE_S
        stands = opened.status.phase
        return stands is Phase.SERVING or (stands is Phase.MOVING and silent)

    def _holds(self, name: DeploymentId) -> bool:
        """Whether requests wait for the next pipeline, which comes in a moment."""
        status = self.view.find(name) if self.view is not None else None
        if status is None or name not in self._last or name in self._closed:
            return False
        return status.phase in {Phase.MOVING, Phase.MENDING} or (
            status.phase is Phase.SERVING and name not in self._open
        )

    def _leave(self, name: DeploymentId, opened: Opened) -> None:
        """Keep for its running requests the pipeline that the deployment has moved from; whatever was left before is no more."""
        status = self.view.find(name) if self.view is not None else None
        if name in self._left:
            _break_off(self._left.pop(name), status)
        if _ends(opened, status):
            self._left[name] = opened
        else:
            _break_off(opened, status)

    def _turn(self) -> None:
        turned, self._turned = self._turned, anyio.Event()
        turned.set()

    def _way_to(self, name: str) -> str:
        """Who asks for a name that nothing here can become is not told to deploy it."""
        if name in self.store.library.names() or any(name == entry.name for entry in CATALOGUE):
            return f"`shoal serve {name}` deploys it"
        known = ", ".join(sorted(self._open))
        return (
            f"use one of {known}" if known else "`shoal models` lists what can be served, `shoal serve NAME` serves it"
        )

    def answers(self, name: DeploymentId) -> bool:
        """Whether requests for *name* are taken now."""
        return name in self._open

    def last_token_age_s(self, name: DeploymentId) -> float | None:
        """Seconds since a token of *name* came through every stage; None before the first."""
        opened = self._open.get(name)
        if opened is None or opened.pipeline.last_token_s is None:
            return None
        return self.clock.now_s() - opened.pipeline.last_token_s

    def prediction(self, name: DeploymentId) -> PredictionView | None:
        """How far requests of *name* were from what its plan says; None before any was compared."""
        opened = self._open.get(name)
        foretold = opened.pipeline.foretold if opened is not None else None
        return foretold.view() if foretold is not None else None

    def predictions(self) -> dict[str, PredictionView]:
        """Of all models that answer here.  For any thread."""
        found = {str(name): self.prediction(name) for name in list(self._open)}
        return {name: view for name, view in found.items() if view is not None}

    async def report(self) -> HealthView:
        """Health, end to end: a deployment that was idle for `IDLE_S` is asked for one token."""
        async with anyio.create_task_group() as group:
            for opened in list(self._open.values()):
                if opened.served.spec.kind is ModelKind.CAUSAL_LM:
                    group.start_soon(self._probe_if_idle, opened)
        statuses = self.view.deployments if self.view is not None else ()
        specs = [status.deployment.spec for status in statuses]
        names = [spec.deployment for spec in specs if spec.source == self.me]
        deployments = tuple(
            DeploymentHealth(name=name, ready=self._flows(name), last_token_age_s=self.last_token_age_s(name))
            for name in names
        )
        return HealthView(components=(self._coordinator(),), deployments=deployments)

    def _coordinator(self) -> ComponentHealth:
        if self._heard_s is None:
            reason = "not heard yet"
        elif (silent_s := self.clock.now_s() - self._heard_s) > LEASE_S:
            reason = f"not heard for {silent_s:.1f} s"
        else:
            return ComponentHealth(name="coordinator", ready=True)
        reason += ": the last plans are served, nothing is planned anew" if self.view is not None else ""
        return ComponentHealth(name="coordinator", ready=False, reason=reason)

    def _flows(self, name: DeploymentId) -> bool:
        """Whether tokens come out: one was seen lately, or a sign of life from a long prompt; or it is no language model."""
        opened = self._open.get(name)
        if opened is None or opened.status.phase is not Phase.SERVING:
            return False
        pipeline = opened.pipeline
        seen_s = pipeline.last_sign_s if pipeline.running else pipeline.last_token_s
        fresh_s = SIGN_S if pipeline.running else IDLE_S + PROBE_TIMEOUT_S
        fresh = seen_s is not None and self.clock.now_s() - seen_s <= fresh_s
        return fresh or opened.served.spec.kind is not ModelKind.CAUSAL_LM

    async def _probe_if_idle(self, opened: Opened) -> None:
        async with opened.probing:  # whoever asks meanwhile waits for that answer, rather than calling it idle
            age_s = self.last_token_age_s(opened.served.name)
            if (age_s is None or age_s > IDLE_S) and not opened.pipeline.running:
                await self._probe(opened)

    async def _probe(self, opened: Opened) -> None:
        token = opened.served.spec.bos_token_id or 0
        request = GenerateRequest(
            request=RequestId(f"probe-{self.new_id()}"),
            deployment=opened.served.name,
            prompt=(token,),
            max_tokens=1,
            ignore_eos=True,
        )
        with anyio.move_on_after(PROBE_TIMEOUT_S):
            try:
                async for _ in opened.executor.generate(request):
                    pass
            except ShoalError as error:
                self.log.warning("probe.failed", deployment=opened.served.name, error=error.message)

    async def _try_open(self, status: DeploymentStatus) -> None:
        name = status.deployment.spec.deployment
        try:
            opened = await anyio.to_thread.run_sync(partial(self._opening.open, status))
        except Exception as error:  # noqa: BLE001 a model's odd tokenizer must not end the node
            said = error.message if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
            if self._closed.get(name) != said:  # tried twice a second, said once
                self.log.warning("model.not_opened", deployment=name, error=said)
            self._closed[name] = said
            return
        self._closed.pop(name, None)
        current = self.view.find(name) if self.view is not None else None
        if current is not None and _epoch(current) == _epoch(status) and current.phase is Phase.SERVING:
            self._open[name] = self._last[name] = replace(opened, status=current)
            self._turn()


_ANSWERING = {Phase.SERVING, Phase.DRAINING, Phase.MOVING, Phase.MENDING}


def _epoch(status: DeploymentStatus) -> tuple[int, int]:
    return status.deployment.spec.generation, status.deployment.plan_epoch


def _ends(opened: Opened, status: DeploymentStatus | None) -> bool:
    """Whether the deployment has moved from this pipeline, which ends its answers."""
    ending = status.deployment.ending if status is not None else None
    return ending is not None and (ending.spec.generation, ending.plan_epoch) == _epoch(opened.status)


def _break_off(opened: Opened, status: DeploymentStatus | None) -> None:
    reason = status.reason if status is not None and status.reason else "the deployment was changed or stopped"
    opened.pipeline.break_off(reason)
