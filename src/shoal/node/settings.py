"""What the owner of a machine may set, in one frozen value, checked at the door.

Precedence: a flag of a command, then the environment (`SHOAL_` and the field's name in capitals), then
`<home>/settings.toml`, then the default here.  A name that nobody reads is an error, because a misspelt quota is no quota.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from shoal.errors import SettingsError
from shoal.plan.replan import DWELL_S
from shoal.store.disk import home_named

_PREFIX = "SHOAL_"
_NOT_SETTINGS = (
    "SHOAL_DEBUG",
    "SHOAL_TEST_",
    "SHOAL_BENCH_",
    "SHOAL_HOME",
    "SHOAL_URL",
    "SHOAL_API_KEY",
    "SHOAL_PIP_PYTHON",
)
"""Read by others: switches of tests and benchmarks, and what the commands need to reach a gateway."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set; `home` comes from the environment alone, for the file lies in it."""

    home: str
    quota_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Bound on what models, what is derived from them and unfinished downloads take on disk; None: the disk's."""
    fetch_bytes_per_s: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """Bound on how fast chunks come from other nodes; None: the link's speed, at most half of it while models are served."""
    move_dwell_s: Annotated[float, msgspec.Meta(ge=1)] = DWELL_S
    """How long a deployment stays where it is at least before it may move again; read where the coordinator runs."""


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Settings of this process; raises SettingsError that names the key and the allowed ones, or the home."""
    environment = os.environ if environment is None else environment
    home = home_folder(environment)
    path = home / "settings.toml"
    with home_named(home):  # every command passes here first: a home that is none is named at once
        from_file = _from_file(path)
    from_environment = {
        key.removeprefix(_PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(_PREFIX) and not key.startswith(_NOT_SETTINGS)
    }
    _check_names(from_file, f"{path}: ", str)
    _check_names(from_environment, "environment variable ", lambda name: _PREFIX + name.upper())
    checked = _parsed({**from_file, "home": str(home)}, f"{path}", strict=True)
    return _parsed({**msgspec.to_builtins(checked), **from_environment}, "environment", strict=False)


def home_folder(environment: Mapping[str, str]) -> Path:
    """`SHOAL_HOME`, else the data folder of the XDG base directory specification."""
    if environment.get("SHOAL_HOME"):
        return Path(environment["SHOAL_HOME"]).expanduser().absolute()
    data = environment.get("XDG_DATA_HOME", "")
    return (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "shoal"


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be read: {error}", hint="mend it or remove it; all settings are optional"
        ) from error


def _check_names(found: Mapping[str, object], where: str, spelt: Callable[[str], str]) -> None:
    allowed = [field for field in Settings.__struct_fields__ if field != "home"]
    for name in found:
        if name in allowed:
            continue
        near = difflib.get_close_matches(name, allowed, n=1)
        guess = f"did you mean {spelt(near[0])}? " if near else ""
        raise SettingsError(
            f"{where}{spelt(name)} is no setting", hint=f"{guess}allowed: {', '.join(map(spelt, allowed))}", param=name
        )


def _parsed(values: Mapping[str, object], where: str, *, strict: bool) -> Settings:
    try:
        return msgspec.convert(dict(values), Settings, strict=strict)
    except msgspec.ValidationError as error:
        allowed = ", ".join(field for field in Settings.__struct_fields__ if field != "home")
        raise SettingsError(f"{where}: {error}", hint=f"mend that value; allowed settings: {allowed}") from error
