"""The models that this node's gateway answers for: follows the coordinator's view, and ends what a lost pipeline cannot.

When a deployment moves, requests that run stay with the pipeline that they were sent to until it has answered them; new ones go to
the next as soon as the view names it, and wait while neither takes any.  A request for a model that is loaded on demand, and is
not, has it woken and waits for that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread
from structlog.typing import FilteringBoundLogger

from shoal.clock import Clock
from shoal.errors import InfeasibleError, ShoalError, UnavailableError, UnknownModelError
from shoal.fleet.reconcile import Phase
from shoal.fleet.report import Use
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.view import LEASE_S, CoordinatorView, DeploymentStatus
from shoal.fleet.views import ComponentHealth, DeploymentHealth, HealthView, PredictionView
from shoal.ids import DeploymentId, NodeId, RequestId
from shoal.model.catalog import CATALOGUE
from shoal.node.artifacts import Artifacts
from shoal.node.opening import Opened, Opening
from shoal.node.pipeline import AnswerDesk
from shoal.node.pulse import Pulse
from shoal.node.rousing import Rousing, Wake, wakes_nobody
from shoal.node.uses import Uses
from shoal.runtime.executor.staged import StagedExecutor
from shoal.serve.ports import ServedModel
from shoal.store.home import Store

T = TypeVar("T")

HOLD_S = 60.0
"""So long may a request wait while a deployment moves: drain, load and link take a few seconds, on slow devices ten times that."""
LOAD_S = 120.0
"""So long may it wait for a model that is loaded on demand: others have to go, and a shard may have to be fetched."""
AGAIN_S, LOADING_AGAIN_S = 2.0, 5.0
"""When to come again for what is not there yet."""


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
    wake: Wake = wakes_nobody
    view: CoordinatorView | None = None
    _heard_s: float | None = None
    """When a coordinator was heard last; None: not since the start."""
    _open: dict[DeploymentId, Opened] = field(default_factory=dict)
    _left: dict[DeploymentId, Opened] = field(default_factory=dict)
    """Pipelines that a deployment has moved from; their running requests go on."""
    _known: dict[DeploymentId, tuple[int, ServedModel]] = field(default_factory=dict)
    """What may be asked of deployments that were open before, or are loaded on demand; by generation."""
    _closed: dict[DeploymentId, str] = field(default_factory=dict)
    """Why those that serve cannot be opened here."""
    _uses: Uses = field(init=False)
    _rousing: Rousing = field(init=False)
    _pulse: Pulse = field(init=False)
    _opening: Opening = field(init=False)
    _news: anyio.Event = field(default_factory=anyio.Event)
    _turned: anyio.Event = field(default_factory=anyio.Event)
    """Set, and replaced, when a request that waits should look again."""

    def __post_init__(self) -> None:
        self._uses, self._rousing = Uses(self.clock), Rousing(self.wake)
        self._pulse = Pulse(self.clock, self.new_id, self.log)
        self._opening = Opening(
            self.store,
            self.artifacts,
            self.desk,
            self.clock,
            self.unix_s,
            self._way,
            self._stands,
            self._resumed,
            self._uses.using,
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
        self._known = {n: (since, model) for n, (since, model) in self._known.items() if generations.get(n) == since}
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
            mine = self._mine()
            wanted = {s.deployment.spec.manifest for s in mine}
            await self._opening.keep_codecs(wanted)
            for status in mine:
                await self._learn(status.deployment.spec)
                known = (status.deployment.spec.deployment, *_epoch(status))
                # Not at the first view that says loading: reading a tokenizer would hold up the start of the worker.
                early = status.phase is Phase.LOADING and known in loading
                if (early or status.phase is Phase.SERVING) and status.deployment.spec.deployment not in self._open:
                    await self._try_open(status)
            loading = {(s.deployment.spec.deployment, *_epoch(s)) for s in mine if s.phase is Phase.LOADING}
            await self._news.wait()

    def served(self) -> Sequence[ServedModel]:
        """Models that answer now, or as soon as somebody asks, by name."""
        on_demand = {s.deployment.spec.deployment for s in self._mine() if s.deployment.spec.on_demand}
        names = self._open.keys() | (self._known.keys() & on_demand)
        return [self._open[n].served if n in self._open else self._known[n][1] for n in sorted(names)]

    def uses(self) -> tuple[Use, ...]:
        """How much those are asked for that are loaded on demand."""
        specs = [status.deployment.spec for status in self._mine()]
        return tuple(self._uses.of(spec.deployment) for spec in specs if spec.on_demand)

    def get(self, name: str) -> ServedModel:
        """One of them; raises UnknownModelError, InfeasibleError, or UnavailableError while it loads or recovers."""
        known = DeploymentId(name)
        opened = self._open.get(known)
        if opened is not None and self._takes(opened):
            return opened.served
        if self._holds(known):
            return self._known[known][1]
        status = self._status(known)
        if status is None:
            deployed = ", ".join(sorted(self._open)) or "none yet"
            raise UnknownModelError(
                f"no model {name!r} is deployed; deployed are: {deployed}",
                hint=self._way_to(name),
                param="model",
            )
        if status.deployment.spec.source != self.me:
            raise UnknownModelError(
                f"this gateway does not answer for {name}",
                hint=f"ask {status.gateway or 'its own gateway'}",
                param="model",
            )
        raise self._refusal(status)

    async def _way(self, name: DeploymentId, patience_s: float | None = None) -> StagedExecutor:
        """The pipeline to ask; waits while the deployment moves, or is loaded because somebody asks.  Raises as `get` does."""
        status = self._status(name)
        limit_s = LOAD_S if status is not None and status.deployment.spec.on_demand else HOLD_S
        limit_s = limit_s if patience_s is None else min(limit_s, patience_s)
        with anyio.move_on_after(limit_s) as waiting:
            while True:
                turned, opened = self._turned, self._open.get(name)
                if opened is not None and (self._takes(opened) or opened.status.phase is Phase.DRAINING):
                    return opened.executor
                if not self._holds(name):
                    break
                await self._rousing.rouse(name, partial(self._to_wake, name))
                with anyio.move_on_after(LEASE_S):  # that no coordinator is heard any more turns nothing
                    await turned.wait()
        status = self._status(name)
        if status is None:
            raise UnavailableError(f"{name} is stopped", hint="try again in a moment", retry_after_s=AGAIN_S)
        raise self._refusal(status, limit_s if waiting.cancelled_caught else None)

    def _refusal(self, status: DeploymentStatus, waited_s: float | None = None) -> ShoalError:
        """What a request is told that cannot be served, or not yet; it has been waiting for *waited_s*."""
        spec = status.deployment.spec
        name = spec.deployment
        if status.phase is Phase.REFUSED:
            return InfeasibleError(f"{name} cannot be placed: {status.reason}", param="model")
        if status.phase is Phase.SERVING or (spec.on_demand and name not in self._known):
            stands = f"cannot be asked yet: {self._closed.get(name, 'its tokenizer is being read')}"
        else:
            silent = "no coordinator is heard that could load it" if spec.on_demand and self._silent() else ""
            why = silent or status.reason or self._rousing.trouble(name)
            stands = f"is {status.phase.value}{f' ({why})' if why else ''}"
        late = f"; {waited_s:g} s were not enough to wait for it" if waited_s is not None else ""
        again_s = LOADING_AGAIN_S if spec.on_demand else AGAIN_S
        return UnavailableError(f"{name} {stands}{late}", hint="try again in a moment", retry_after_s=again_s)

    def _to_wake(self, name: DeploymentId) -> NodeId | None:
        """Whom to ask to wake it; None when it is awake, or there is nobody."""
        status = self._status(name)
        sleeps = status is not None and status.phase in {Phase.ASLEEP, Phase.DROWSY}
        return self.view.lease.holder if sleeps and self.view is not None else None

    def _status(self, name: DeploymentId) -> DeploymentStatus | None:
        return self.view.find(name) if self.view is not None else None

    def _mine(self) -> list[DeploymentStatus]:
        """The deployments that this gateway answers for."""
        statuses = self.view.deployments if self.view is not None else ()
        return [status for status in statuses if status.deployment.spec.source == self.me]

    def _silent(self, for_s: float = LEASE_S) -> bool:
        """Whether no coordinator has been heard for so long."""
        return self._heard_s is None or self.clock.now_s() - self._heard_s > for_s

    def _stands(self, name: DeploymentId, generation: int) -> bool:
        """Whether an answer may wait for the next pipeline: what it came from is still wanted as it was.

        That no plan fits now does not end it: nodes that were cut off come back, and it waits for so long and no longer.
        """
        status = self._status(name)
        return status is not None and _epoch(status)[0] == generation

    def _resumed(self, request: RequestId, tokens: int) -> None:
        self.log.info("answer.resumed", request=request, tokens=tokens)

    def _takes(self, opened: Opened) -> bool:
        """Whether the pipeline takes new requests; one that is to be left does when nobody is there to end that."""
        stands = opened.status.phase
        return stands is Phase.SERVING or (stands in {Phase.MOVING, Phase.DROWSY} and self._silent())

    def _holds(self, name: DeploymentId) -> bool:
        """Whether requests wait for the next pipeline, which comes in a moment, or is loaded because they ask."""
        status = self._status(name)
        if status is None or name not in self._known or name in self._closed:
            return False
        if status.deployment.spec.on_demand:
            # A standby takes the lease over when it has heard nobody for as long as one lasts.
            return status.phase not in {Phase.REFUSED, Phase.DRAINING} and not self._silent(2 * LEASE_S)
        return status.phase in {Phase.MOVING, Phase.MENDING} or (
            status.phase is Phase.SERVING and name not in self._open
        )

    def _leave(self, name: DeploymentId, opened: Opened) -> None:
        """Keep for its running requests the pipeline that the deployment has moved from; whatever was left before is no more."""
        status = self._status(name)
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
        return self._pulse.last_token_age_s(opened) if opened is not None else None

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
        """Health, end to end: a deployment that was idle for a second is asked for one token; one that is asleep sleeps on."""
        async with anyio.create_task_group() as group:
            for opened in list(self._open.values()):
                group.start_soon(self._pulse.probe_if_idle, opened)
        return HealthView(
            components=(self._coordinator(),), deployments=tuple(self._health(status) for status in self._mine())
        )

    def _health(self, status: DeploymentStatus) -> DeploymentHealth:
        name = status.deployment.spec.deployment
        opened = self._open.get(name)
        comes = status.deployment.spec.on_demand and status.phase in _COMING and self._holds(name)
        return DeploymentHealth(
            name=name,
            ready=comes or (opened is not None and self._pulse.flows(opened)),
            last_token_age_s=self.last_token_age_s(name),
            asleep=status.phase in {Phase.ASLEEP, Phase.DROWSY},
        )

    def _coordinator(self) -> ComponentHealth:
        if self._heard_s is None:
            reason = "not heard yet"
        elif (silent_s := self.clock.now_s() - self._heard_s) > LEASE_S:
            reason = f"not heard for {silent_s:.1f} s"
        else:
            return ComponentHealth(name="coordinator", ready=True)
        reason += ": the last plans are served, nothing is planned anew" if self.view is not None else ""
        return ComponentHealth(name="coordinator", ready=False, reason=reason)

    async def _learn(self, spec: DeploymentSpec) -> None:
        """Know what may be asked of a model that is loaded on demand, whether it is loaded or not."""
        if spec.on_demand and spec.deployment not in self._known:
            served = await self._tried(spec.deployment, lambda: self._opening.served(spec, spec.shape))
            status = self._status(spec.deployment)
            if served is not None and status is not None and status.deployment.spec.generation == spec.generation:
                self._known[spec.deployment] = (spec.generation, served)
                self._turn()

    async def _try_open(self, status: DeploymentStatus) -> None:
        name = status.deployment.spec.deployment
        opened = await self._tried(name, lambda: self._opening.open(status))
        current = self._status(name)
        if opened is None or current is None:
            return
        if _epoch(current) == _epoch(status) and current.phase is Phase.SERVING:
            self._open[name] = replace(opened, status=current)
            self._known[name] = (_epoch(current)[0], opened.served)
            self._turn()

    async def _tried(self, name: DeploymentId, work: Callable[[], T]) -> T | None:
        """What *work* gives on a thread; None when it fails, which is said once though it is tried twice a second."""
        try:
            done = await anyio.to_thread.run_sync(work)
        except Exception as error:  # noqa: BLE001 a model's odd tokenizer must not end the node
            said = error.message if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
            if self._closed.get(name) != said:
                self.log.warning("model.not_opened", deployment=name, error=said)
            self._closed[name] = said
            return None
        self._closed.pop(name, None)
        return done


_ANSWERING = {Phase.SERVING, Phase.DRAINING, Phase.MOVING, Phase.MENDING, Phase.DROWSY}
_COMING = {Phase.ASLEEP, Phase.DROWSY, Phase.PLANNING, Phase.LOADING}
"""Where a model that is loaded on demand will answer whoever asks, after a while."""


def _epoch(status: DeploymentStatus) -> tuple[int, int]:
    return status.deployment.spec.generation, status.deployment.plan_epoch


def _ends(opened: Opened, status: DeploymentStatus | None) -> bool:
    """Whether the deployment has moved from this pipeline, which ends its answers."""
    ending = status.deployment.ending if status is not None else None
    return ending is not None and (ending.spec.generation, ending.plan_epoch) == _epoch(opened.status)


def _break_off(opened: Opened, status: DeploymentStatus | None) -> None:
    reason = status.reason if status is not None and status.reason else "the deployment was changed or stopped"
    opened.pipeline.break_off(reason)
