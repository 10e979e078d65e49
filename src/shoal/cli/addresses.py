"""Say that an address is taken before anything is downloaded or opened, in the words of the command that was typed.

Whoever binds later says it too (`serve.run`, `transport.session`), but cannot know which flag chose the address.
"""

from contextlib import closing
from pathlib import Path

from shoal.errors import PortInUseError
from shoal.node.options import NodeOptions
from shoal.node.running import running_node
from shoal.serve.run import bind

_MAX_PORT = 65535


def check_free(options: NodeOptions, *, http_flag: str) -> None:
    """Raise PortInUseError, with the flag to give, for an address that another program listens on.

    *http_flag* sets where the gateway listens: `--port`, or `--gateway` with its host.  A node that runs in the same home is
    left for `run_node` to name: its address is not what is wrong.
    """
    if running_node(Path(options.home)) is not None:
        return
    if options.http is not None:
        host, port = options.http
        before = f"{_bracketed(host)}:" if http_flag == "--gateway" else ""
        _try(host, port, hint=f"{http_flag} {before}{_next(port)}, or {http_flag} {before}0 for any free one")
    name, _, number = options.listen.removeprefix("tcp/").rpartition(":")
    hint = f"--listen {name}:{_next(int(number))}, or --listen {name}:0 for any free one"
    _try(name.strip("[]"), int(number), hint=hint)


def _try(host: str, port: int, *, hint: str) -> None:
    try:
        with closing(bind(host, port)):
            return
    except PortInUseError as error:
        raise PortInUseError(
            error.message, hint=f"another shoal? stop it, or choose another address: {hint}"
        ) from error


def _next(port: int) -> int:
    return port + 1 if port < _MAX_PORT else port - 1


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
