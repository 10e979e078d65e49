"""The command line's door: which commands there are, and how errors look.

A command is a file of this folder that holds a function of the same name; `COMMANDS` lists it with one line of help.  The
file is imported only when its command runs: engines and array libraries take longer to import than `shoal --help` may.
"""

import difflib
import importlib
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from shoal import __version__
from shoal.errors import InvalidRequestError, ShoalError, UnavailableError, UntrustedError

COMMANDS: dict[str, str] = {
    "demo": "Three unequal nodes on this machine answer through one pipeline.",
    "serve": "Deploy a model: measure, plan, load, answer.",
    "chat": "Talk with a deployed model.",
    "up": "Start this machine's node with a gateway; the first node coordinates its fleet.",
    "join": "Add this machine to a fleet.",
    "leave": "Drain a node and let it go.",
    "nodes": "List the machines of the fleet.",
    "profile": "Measure devices and links for a model, or show what was measured.",
    "plan": "Show where a model would go, before anything is loaded.",
    "simulate": "Run a plan in virtual time, and hold what was predicted against it.",
    "ps": "List what is served, and by whom.",
    "stop": "Stop serving a deployment.",
    "logs": "Show what happened in the fleet.",
    "pull": "Bring a model to this machine, by catalogue name or reference.",
    "models": "List the models of this machine, and what can be pulled.",
    "rm": "Forget a model; `gc` then frees its space.",
    "gc": "Free the space of what no model needs.",
}
"""Name and help of each command, in the order of `shoal --help`."""

EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


def exit_code(error: ShoalError) -> int:
    """What a script sees: 2 change the request, 69 try later or elsewhere, 77 do not trust (sysexits.h where it has one)."""
    codes = ((InvalidRequestError, 2), (UnavailableError, 69), (UntrustedError, 77))
    return next((code for kind, code in codes if isinstance(error, kind)), EXIT_INTERNAL)


class LazyCommands(TyperGroup):
    """Lists commands without importing them, and turns errors of ours into text and exit codes."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # noqa: ARG002 typer's signature, on click's own Context
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:  # type: ignore[override]  # noqa: ARG002 likewise
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: typer.Context, args: list[str]):  # type: ignore[no-untyped-def, override]  # noqa: ANN201  likewise
        if args and args[0] in COMMANDS:
            return args[0], _load(args[0]), args[1:]
        if args and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            guess = f"did you mean `shoal {near[0]}`?" if near else "`shoal --help` lists them"
            raise InvalidRequestError(f"there is no command {args[0]!r}", hint=guess)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # likewise
        if os.environ.get("SHOAL_DEBUG") == "1":
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except ShoalError as error:
            complain(error.message, error.hint)
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except Exception as error:  # the last door: a traceback helps nobody who did not ask for one
            if isinstance(error, BrokenPipeError) or type(error).__module__.startswith(("typer.", "click.")):
                raise
            complain(
                f"{type(error).__name__}: {error}",
                "this is a fault of Shoal or of this machine; SHOAL_DEBUG=1 shows where",
            )
            raise typer.Exit(EXIT_INTERNAL) from error


def complain(message: str, hint: str) -> None:
    """How an error looks: what is wrong, and what to do next."""
    sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))


def _load(name: str) -> object:
    function = getattr(importlib.import_module(f"shoal.cli.{name}"), name)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(name, help=COMMANDS[name])(function)
    return typer.main.get_command(single)


# Plain help: the rich one costs 0.2 s of imports at every start.
app = typer.Typer(
    name="shoal", cls=LazyCommands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it with the option's value
    if wanted:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def shoal(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Unequal machines at the edge act as one inference service."""
    del version  # its callback has acted on it


def main() -> None:
    """Run the command line."""
    app()
