"""What a Zenoh session is asked for, and what its refusals mean: pure, so that it can be read and tested without a session."""

from collections.abc import Mapping, Sequence

from shoal.errors import NodeUnreachableError, PortInUseError, SettingsError, ShoalError

LEASE_S = 2.0
MAX_MESSAGE_BYTES = 64 << 20
BLOCK_S = 1.0
"""How long a put waits on a full queue before the link is given up.  Below the lease, so that one frozen receiver does not take
the link of a healthy neighbour with it; credits keep the queue from ever filling."""


def must_connect(timeout_s: float) -> Mapping[str, object]:
    """Opening fails unless one endpoint answers within *timeout_s*."""
    return {"timeout_ms": round(timeout_s * 1000), "exit_on_failure": True}


def try_once(timeout_s: float) -> Mapping[str, object]:
    """Opening succeeds whoever answers; endpoints that do not within *timeout_s* are given up."""
    return {"timeout_ms": round(timeout_s * 1000), "exit_on_failure": False}


def keep_trying() -> Mapping[str, object]:
    """Opening succeeds at once; absent endpoints are dialled for ever."""
    return {"timeout_ms": -1, "exit_on_failure": False}


def session_config(
    mode: str, listen: Sequence[str], connect: Sequence[str], persistence: Mapping[str, object], *, discover: bool
) -> dict[str, object]:
    """Zenoh's configuration as a JSON value; gossip stays off, for links that we did not plan must not appear."""
    return {
        "mode": mode,
        "listen": {"endpoints": list(listen), "exit_on_failure": True},
        "connect": {
            "endpoints": list(connect),
            **persistence,
            "retry": {"period_init_ms": 100, "period_max_ms": 1000, "period_increase_factor": 2},
        },
        "scouting": {
            # How long opening waits for those it dials; with nobody to dial it would only be half a second lost.
            "delay": 500 if connect else 0,
            "multicast": {"enabled": discover, "autoconnect": {"router": ["router"] if discover else []}},
            "gossip": {"enabled": False},
        },
        "adminspace": {"enabled": True, "permissions": {"read": True, "write": False}},
        "transport": {
            "shared_memory": {"enabled": False},
            "link": {
                "tx": {
                    "lease": round(LEASE_S * 1000),
                    "keep_alive": 4,
                    "queue": {"congestion_control": {"block": {"wait_before_close": round(BLOCK_S * 1_000_000)}}},
                },
                "rx": {"max_message_size": MAX_MESSAGE_BYTES},
            },
        },
    }


def refusal(text: str, listen: Sequence[str], connect: Sequence[str]) -> ShoalError:
    """Zenoh has one error class; what went wrong stands in its text, up to the ` at FILE:LINE` that we cut."""
    reason = text.split(" at /", 1)[0]
    if "in use" in text:
        return PortInUseError(
            f"cannot listen on {', '.join(listen)}: the address is in use",
            hint="another shoal? stop it, or choose another port, or 0 for any free one",
        )
    if "Unable to connect" in text:
        hint = "is the node up, and does a firewall let this port through?"
        return NodeUnreachableError(f"nothing answers at {', '.join(connect)}: {reason}", hint=hint)
    hint = "an endpoint looks like tcp/192.168.1.20:7447, with an address of this machine where it listens"
    return SettingsError(f"cannot open a session (listen {list(listen)}, connect {list(connect)}): {reason}", hint=hint)
