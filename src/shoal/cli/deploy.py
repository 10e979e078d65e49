"""Deploying from the command line: show the plan first, then watch it come up (`serve` and `demo` share this)."""

import time
from pathlib import Path

from rich.console import Console

from shoal.cli.plan_table import render_plan
from shoal.cli.progress import shown
from shoal.client import Shoal
from shoal.client.calls import PlanOptions, ServeOptions
from shoal.errors import DeadlineExceededError, InfeasibleError, UnavailableError
from shoal.fleet.views import DeploymentState, DeploymentView
from shoal.model.spec import ModelKind
from shoal.node.importing import import_files
from shoal.node.pull import PullRequest
from shoal.node.pull import pull as pull_model
from shoal.node.settings import Settings
from shoal.plan.problem import Infeasible, Plan
from shoal.store.home import open_store

_LOADING_LIMIT_S = 300.0


def have_model(reference: str, settings: Settings, console: Console) -> str:
    """The name of a model in this machine's store; pulled when it is not there."""
    store = open_store(Path(settings.home), quota_bytes=settings.quota_bytes)
    if reference in store.library.names():
        return reference
    with shown(console) as progress:
        return pull_model(store, PullRequest(reference=reference), import_files, progress).name


def show_plan(shoal: Shoal, model: str, wanted: PlanOptions, console: Console) -> Plan:
    """Ask for the plan and print it; raises InfeasibleError when there is none."""
    with console.status("measuring devices and links"):
        answer = shoal.plan(model, **wanted)
    console.print(render_plan(answer, {n.id: n.name for n in shoal.nodes()}))
    match answer:
        case Infeasible(reason=reason, hint=hint):
            raise InfeasibleError(reason, hint=hint)
        case Plan() as plan:
            return plan


def deploy_and_wait(shoal: Shoal, model: str, name: str, wanted: ServeOptions, console: Console) -> DeploymentView:
    """Deploy and wait until it serves, or would when it is asked; raises UnavailableError or DeadlineExceededError."""
    made = shoal.deploy(model, name=name, **wanted)
    began_s = time.monotonic()
    with console.status("loading") as status:
        while time.monotonic() - began_s < _LOADING_LIMIT_S:
            found = next((d for d in shoal.deployments() if d.name == made.name), None)
            if found is not None and found.state is DeploymentState.READY:
                console.print(f"[green]{made.name} is ready[/] after {time.monotonic() - began_s:.1f} s")
                return found
            if found is not None and found.state is DeploymentState.ASLEEP:
                console.print(f"[green]{made.name} is asleep[/]: the first request loads it")
                return found
            if found is not None and found.state is DeploymentState.FAILED:
                raise UnavailableError(f"{made.name} cannot be served: {found.detail}")
            if found is not None:
                status.update(f"{found.state.value} {found.detail}")
            time.sleep(0.1)
    raise DeadlineExceededError(f"{made.name} did not come up within {_LOADING_LIMIT_S:.0f} s", hint="see `shoal logs`")


def curl_line(url: str, model: str, kind: str = ModelKind.CAUSAL_LM) -> str:
    """A request to copy, fit for the kind of model."""
    if kind == ModelKind.ENCODER:
        asked = f'{{"model": "{model}", "input": "Hello"}}'
        return f"curl {url}/v1/embeddings -H 'Content-Type: application/json' -d '{asked}'"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
