"""Who may call: API keys, host names, origins.  Decisions are pure; reading the key file is the one exception.

A gateway on loopback is not private by itself: any web page that its owner opens may send requests to it, by DNS rebinding
(a foreign `Host`) or across origins (a foreign `Origin`).  Both are refused unless its owner names them.
"""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import InvalidRequestError, SettingsError, UnauthorizedError

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MIN_KEY_LENGTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The door's rules.  `keys` are SHA-256 digests; none means that no key is asked for."""

    keys: frozenset[bytes] = frozenset()
    hosts: frozenset[str] | None = _LOOPBACK_NAMES
    """Names that `Host` may give (without port); None: any."""
    origins: frozenset[str] = frozenset()
    """Other web origins that may call from a browser."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a socket bound to *host*."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def access_for(
    host: str, keys: frozenset[bytes], *, names: tuple[str, ...] = (), origins: tuple[str, ...] = ()
) -> Access:
    """Rules for a gateway bound to *host*; raises SettingsError when it would stand open beyond this machine."""
    local = is_loopback(host)
    if not local and not keys:
        raise SettingsError(
            f"the gateway would listen on {host or 'all addresses'}, beyond this machine, without an API key",
            hint="make one: python -c 'import secrets; print(secrets.token_urlsafe(32))' > api-keys, "
            "and pass the file with --api-keys; or listen on 127.0.0.1",
            param="api_keys",
        )
    hosts = frozenset(n.lower() for n in names) | (_LOOPBACK_NAMES if local or names else frozenset())
    return Access(keys=keys, hosts=hosts or None, origins=frozenset(o.lower() for o in origins))


def read_keys(path: Path) -> frozenset[bytes]:
    """Digests of the keys in *path*: one a line, `#` begins a comment line; raises SettingsError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"cannot read API keys from {path}: {error}",
            hint="give --api-keys a text file that this user may read, one key a line",
            param="api_keys",
        ) from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise SettingsError(f"{path} holds no API key", hint="put one on a line of its own", param="api_keys")
    if any(len(key) < _MIN_KEY_LENGTH for key in keys):
        raise SettingsError(
            f"{path} holds a key shorter than {_MIN_KEY_LENGTH} characters",
            hint="python -c 'import secrets; print(secrets.token_urlsafe(32))' prints a good one",
            param="api_keys",
        )
    return frozenset(digest_key(key) for key in keys)


def digest_key(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


def check_key(access: Access, authorization: str | None) -> None:
    """Raise UnauthorizedError unless *authorization* bears one of the keys (or none is asked for)."""
    if not access.keys:
        return
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise UnauthorizedError("an API key is required", hint="send the header Authorization: Bearer KEY")
    given = digest_key(key.strip())
    # Every digest is compared, so that time does not tell which key, or how much of it, was right.
    if not any([hmac.compare_digest(given, known) for known in access.keys]):  # noqa: C419 - no short cut, see above
        raise UnauthorizedError("the API key is not known here", hint="ask for the key file's current content")


def check_caller(access: Access, host: str | None, origin: str | None) -> None:
    """Raise InvalidRequestError for a foreign `Host` or `Origin`."""
    name = _without_port((host or "").lower())
    if access.hosts is not None and name not in access.hosts:
        raise InvalidRequestError(
            f"this gateway does not answer for host {name or '(none)'}",
            hint="start the gateway's node with --allow-host and that name",
            param="Host",
        )
    if origin is None or origin.lower() in access.origins:
        return
    if origin.lower().partition("://")[2] != (host or "").lower():
        raise InvalidRequestError(
            f"pages of {origin} may not call this gateway",
            hint=f"start the gateway's node with --allow-origin {origin}, if those pages are yours",
            param="Origin",
        )


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
