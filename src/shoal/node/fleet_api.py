"""The fleet as the gateway of this node sees it: questions go to whoever holds the lease (`serve.ports`)."""

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import anyio
import anyio.to_thread
import msgspec

from shoal.errors import (
    CorruptFileError,
    InfeasibleError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
    UnknownNodeError,
)
from shoal.fleet.reconcile import Phase
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.view import CoordinatorView, DeploymentStatus
from shoal.fleet.views import (
    DeploymentState,
    DeploymentView,
    DeployRequest,
    EventView,
    JoinView,
    NodeView,
    PlanRequest,
    PredictionView,
    ProfileRequest,
)
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.model.spec import ModelSpec
from shoal.node.calls import Caller
from shoal.node.drafting import draft_for
from shoal.node.messages import (
    AskEvents,
    AskNodes,
    AskProblem,
    AskProfile,
    Deploy,
    Drop,
    Events,
    Leave,
    Nodes,
    Nothing,
    Preview,
    Previewed,
    Stated,
)
from shoal.plan.problem import Answer, Infeasible, Plan, Problem, RequestShape
from shoal.profile.fleet import FleetProfile
from shoal.store.home import Store

_QUICK_S = 10.0
_MEASURING_S = 300.0
_EVENT_POLL_S = 0.5
NAME_MAX = 200
_NAME = re.compile(r"[A-Za-z0-9][\w.:@-]*(/[A-Za-z0-9][\w.:@-]*)*", re.ASCII)

STATES = {
    Phase.PLANNING: DeploymentState.PLANNED,
    Phase.LOADING: DeploymentState.LOADING,
    Phase.SERVING: DeploymentState.READY,
    Phase.DRAINING: DeploymentState.DEGRADED,
    Phase.MOVING: DeploymentState.DEGRADED,
    Phase.MENDING: DeploymentState.DEGRADED,
    Phase.RECOVERING: DeploymentState.DEGRADED,
    Phase.REFUSED: DeploymentState.FAILED,
    Phase.DROWSY: DeploymentState.ASLEEP,
    Phase.ASLEEP: DeploymentState.ASLEEP,
}


def nothing_compared(_: DeploymentId) -> PredictionView | None:
    """Where no requests are compared with plans."""
    return None


@dataclass(slots=True)
class FleetApi:
    """Implements `Machines`, `Placement` and `EventLog` of `serve.ports` by asking the coordinator."""

    me: NodeId
    caller: Caller
    store: Store
    view: Callable[[], CoordinatorView | None]
    join: JoinView
    last_token_age_s: Callable[[DeploymentId], float | None]
    answers: Callable[[DeploymentId], bool]
    """Whether this node's gateway has opened the deployment's pipeline."""
    prediction: Callable[[DeploymentId], PredictionView | None] = nothing_compared

    async def nodes(self) -> Sequence[NodeView]:
        """Every node that is known."""
        told = await self.caller.call(self._coordinator(), "nodes", AskNodes(), Nodes, timeout_s=_QUICK_S)
        return told.nodes

    async def profile(self, wanted: ProfileRequest) -> FleetProfile:
        """Measure, or answer from what is remembered; raises UnknownNodeError."""
        await self._check_nodes(wanted.nodes)
        name = wanted.model or await anyio.to_thread.run_sync(self._only_model)
        manifest = await anyio.to_thread.run_sync(self.store.library.digest, name)
        asked = AskProfile(manifest=manifest, source=self.me, nodes=wanted.nodes, again=wanted.refresh)
        return await self.caller.call(self._coordinator(), "fleet_profile", asked, FleetProfile, timeout_s=_MEASURING_S)

    async def join_info(self) -> JoinView:
        """What to type on a machine that is to join."""
        return self.join

    async def leave(self, node: NodeId) -> None:
        """Ask the node to drain and go; raises UnknownNodeError."""
        await self._check_nodes((node,))
        await self.caller.call(node, "leave", Leave(), Nothing, timeout_s=_QUICK_S)

    async def plan(self, wanted: PlanRequest) -> Answer:
        """The plan that a deployment would get; nothing is loaded."""
        spec = await self._spec(wanted, DeploymentId(wanted.model))
        told = await self.caller.call(
            self._coordinator(), "preview", Preview(spec=spec), Previewed, timeout_s=_MEASURING_S
        )
        return told.answer

    async def problem(self, wanted: PlanRequest) -> Problem:
        """What a plan would be made from; raises InfeasibleError when it cannot even be stated."""
        spec = await self._spec(wanted, DeploymentId(wanted.model))
        asked = AskProblem(spec=spec)
        told = await self.caller.call(self._coordinator(), "problem", asked, Stated, timeout_s=_MEASURING_S)
        if told.problem is None:
            refused = told.refused or Infeasible(reason="no problem was stated", needed_bytes=0, available_bytes=0)
            raise InfeasibleError(refused.reason, hint=refused.hint)
        return told.problem

    async def deploy(self, wanted: DeployRequest) -> DeploymentView:
        """Declare a deployment; raises InfeasibleError when no plan fits now."""
        name = DeploymentId(wanted.name or wanted.plan.model)
        check_name(name)
        spec = await self._spec(wanted.plan, name)
        spec = msgspec.structs.replace(
            spec,
            speculation=wanted.speculation,
            recovery=wanted.recovery,
            on_demand=wanted.on_demand,
            keep_alive_s=wanted.keep_alive_s,
        )
        coordinator = self._coordinator()
        told = await self.caller.call(coordinator, "preview", Preview(spec=spec), Previewed, timeout_s=_MEASURING_S)
        match told.answer:
            case Infeasible(reason=reason, hint=hint):
                raise InfeasibleError(reason, hint=hint)
            case Plan() as plan:
                asked = Deploy(spec=spec, previewed=plan)
                await self.caller.call(coordinator, "deploy", asked, Nothing, timeout_s=_QUICK_S)
                state = DeploymentState.ASLEEP if spec.on_demand else DeploymentState.PLANNED
                return DeploymentView(
                    name=name, model=wanted.plan.model, state=state, plan=plan, on_demand=spec.on_demand
                )

    async def deployments(self) -> Sequence[DeploymentView]:
        """All that are wanted."""
        view = self.view()
        statuses = view.deployments if view is not None else ()
        models = {status.deployment.spec.model for status in statuses}
        kinds = await anyio.to_thread.run_sync(lambda: {model: self._kind(model) for model in models})
        return [self._shown(status, kinds) for status in statuses]

    async def stop(self, name: DeploymentId) -> None:
        """Stop serving."""
        await self.caller.call(self._coordinator(), "drop", Drop(deployment=name), Nothing, timeout_s=_QUICK_S)

    async def events(self, after: int, limit: int) -> Sequence[EventView]:
        """What the coordinator noted."""
        asked = AskEvents(after=after, limit=limit)
        told = await self.caller.call(self._coordinator(), "events", asked, Events, timeout_s=_QUICK_S)
        return told.events

    async def follow(self, after: int) -> AsyncIterator[EventView]:
        """The same without end, asked for twice a second: the coordinator may be another node, and may change.

        While none is heard, or it does not answer, nothing is said; the next holder numbers its events above these.
        """
        while True:
            news: Sequence[EventView] = ()
            with contextlib.suppress(UnavailableError):
                news = await self.events(after, 1000)
            for event in news:
                after = event.sequence
                yield event
            await anyio.sleep(_EVENT_POLL_S)

    async def _check_nodes(self, wanted: Sequence[NodeId]) -> None:
        """Raise UnknownNodeError for an id that no member has; without a coordinator nobody can tell, and the node is asked."""
        if not wanted:
            return
        try:
            nodes = await self.nodes()
        except UnavailableError:
            return
        unknown = [node for node in wanted if all(node != known.id for known in nodes)]
        if unknown:
            listed = ", ".join(f"{known.id} ({known.name})" for known in nodes)
            raise UnknownNodeError(
                f"no node {unknown[0]}; nodes are: {listed or 'none'}",
                hint="give a node's id, not its name",
                param="node",
            )

    def _coordinator(self) -> NodeId:
        view = self.view()
        if view is None:
            raise UnavailableError(
                "no coordinator has been heard yet", hint="start the fleet's first node with `shoal up`"
            )
        return view.lease.holder

    async def _spec(self, wanted: PlanRequest, name: DeploymentId) -> DeploymentSpec:
        manifest = await anyio.to_thread.run_sync(partial(self.store.library.digest, wanted.model))
        model = await anyio.to_thread.run_sync(partial(self.store.library.read, wanted.model))
        return DeploymentSpec(
            deployment=name,
            model=wanted.model,
            manifest=manifest,
            source=self.me,
            shape=fitting(wanted.shape, model.spec),
            objective=wanted.objective,
            stages_exactly=wanted.stages,
            pins=wanted.pins,
            exclude=wanted.exclude,
            limits=wanted.limits,
            residency=wanted.residency,
            choose=wanted.choose,
            cloud=wanted.cloud,
            relays=wanted.relays,
            activations=wanted.activations,
            activations_per_cut=wanted.activations_per_cut,
            draft=await anyio.to_thread.run_sync(self._draft, wanted),
        )

    def _draft(self, wanted: PlanRequest) -> Digest:
        return draft_for(self.store, wanted.draft, wanted.model) if wanted.draft else Digest("")

    def _kind(self, model: str) -> str:
        try:
            manifest = self.store.library.find(model)
        except CorruptFileError:
            return ""
        return manifest.spec.kind.value if manifest is not None else ""

    def _only_model(self) -> str:
        names = self.store.library.names()
        if len(names) != 1:
            raise UnknownModelError(
                f"this node has {len(names)} models: say which one to profile", hint="`shoal models` lists them"
            )
        return names[0]

    def _shown(self, status: DeploymentStatus, kinds: Mapping[str, str]) -> DeploymentView:
        deployment = status.deployment
        name = deployment.spec.deployment
        state = STATES[status.phase]
        if state is DeploymentState.READY and deployment.spec.source == self.me and not self.answers(name):
            state = DeploymentState.LOADING  # the pipeline is up, its tokenizer is still being read
        return DeploymentView(
            name=name,
            model=deployment.spec.model,
            kind=kinds[deployment.spec.model],
            state=state,
            detail=status.reason or ("the next request loads it" if status.phase is Phase.ASLEEP else ""),
            plan=deployment.answer if isinstance(deployment.answer, Plan) else None,
            plan_epoch=deployment.plan_epoch,
            moved=deployment.moved,
            mends=deployment.mends,
            on_demand=deployment.spec.on_demand,
            busy=status.busy,
            last_token_age_s=self.last_token_age_s(name),
            prediction=self.prediction(name),
        )


def check_name(name: str) -> None:
    """Raise InvalidRequestError for a deployment's name that addresses, shells and terminals would spoil."""
    if len(name) > NAME_MAX or _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            f"{name[:NAME_MAX]!r} cannot be a deployment's name",
            hint=f"at most {NAME_MAX} letters, digits, dots, dashes, underscores, colons and @, in parts between slashes "
            "that begin with a letter or digit, for example org/model:small",
            param="name",
        )


def fitting(shape: RequestShape, model: ModelSpec) -> RequestShape:
    """*shape* within the context that *model* was made for: the default is cut to it, a wish beyond it is refused."""
    limit = model.context_tokens
    if not limit or shape.context_tokens <= limit:
        return shape
    if shape.context_tokens != RequestShape().context_tokens:
        raise InvalidRequestError(
            f"{model.name} was made for a context of {limit} tokens, {shape.context_tokens} are asked for",
            hint=f"ask for at most --context {limit}",
            param="context_tokens",
        )
    tokens_in = min(shape.tokens_in, limit // 2)
    return msgspec.structs.replace(
        shape, context_tokens=limit, tokens_in=tokens_in, tokens_out=min(shape.tokens_out, limit - tokens_in)
    )
