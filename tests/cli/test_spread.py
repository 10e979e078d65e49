"""Options that commands share: on the command line and for callers they are the fields, inside one value."""

from typing import Annotated

import msgspec
import typer
from typer.testing import CliRunner

from shoal.cli.spread import spread


class Paint(msgspec.Struct, frozen=True, kw_only=True):
    colour: Annotated[str, typer.Option(help="Of the wall.")] = "white"
    coats: Annotated[int, typer.Option("--coat-count", help="How often.", min=1)] = 2
    glossy: Annotated[bool, typer.Option("--glossy")] = False


def paints(seen: list[object]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @spread
    def wall(name: str, *, wet: bool = False, paint: Paint = Paint(colour="grey")) -> None:  # noqa: B008 frozen
        seen.extend([name, wet, paint])

    return app


def test_a_field_is_an_option_with_its_name_its_help_and_the_groups_default() -> None:
    shown = CliRunner().invoke(paints([]), ["--help"], env={"COLUMNS": "200"}).stdout

    for words in ("--colour", "Of the wall.", "grey", "--coat-count", "How often.", "--glossy", "--wet"):
        assert words in shown
    assert "--paint" not in shown


def test_what_is_given_arrives_in_one_value_and_the_rest_is_the_default() -> None:
    seen: list[object] = []

    done = CliRunner().invoke(paints(seen), ["north", "--wet", "--coat-count", "3"])

    assert (done.exit_code, seen) == (0, ["north", True, Paint(colour="grey", coats=3)])


def test_whoever_calls_the_command_gives_fields_too() -> None:
    seen: list[object] = []

    @spread
    def wall(*, paint: Paint = Paint()) -> None:  # noqa: B008 frozen
        seen.append(paint)

    wall(coats=5, glossy=True)

    assert seen == [Paint(coats=5, glossy=True)]


def test_a_value_outside_a_fields_bounds_is_refused() -> None:
    done = CliRunner().invoke(paints([]), ["north", "--coat-count", "0"])

    assert done.exit_code == 2
    assert "--coat-count" in done.output
