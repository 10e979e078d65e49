"""llama.cpp on the network: `llama-server` on the first host, `ggml-rpc-server` on the others, the same file and shares.

As it does best here: the output matrix stays on the first host, for elsewhere each token's 49,152 logits would have to come back
(`OUTPUT_THERE` shows it); tensors are cached on the far side; prompts are not saved aside when a slot changes hands, which would
fetch caches over the link.
"""

import http.client
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.links.network import Host
from bench.links.serving import Server
from bench.links.settings import Setting
from bench.measure import SCRATCH, Options, SkippedError, child_environment, ended
from bench.nodes import wait_until

SERVER, WORKER = "llama-server", "ggml-rpc-server"
LAYERS = 30
HEAD_LAYERS = 8
"""The output matrix is as much work as so many layers."""
CONTEXT_TOKENS = 1024
_HTTP_PORT, _RPC_PORT = 8080, 50052
_START_LIMIT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How the peer is started."""

    output_here: bool = True
    flags: tuple[str, ...] = ()


PLAIN = Variant()
OUTPUT_THERE = Variant(output_here=False)
GUESSING = Variant(
    flags=("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3", "--spec-ngram-simple-size-m", "8")
)
"""Its own guesses; with the lengths that it has by default they gain nothing here."""


def missing(options: Options) -> str:
    """What is lacking of the peer; empty: nothing."""
    if not options.llama_rpc:
        return f"no peer: --llama-rpc FOLDER with {SERVER} and {WORKER} (see bench/README.md)"
    lacking = [name for name in (SERVER, WORKER) if not os.access(Path(options.llama_rpc) / name, os.X_OK)]
    return f"{options.llama_rpc} has no {' and no '.join(lacking)}" if lacking else ""


def far_layers(hosts: int, *, output_here: bool) -> int:
    """Layers that are computed away from the first host, so that all have equal shares of the work."""
    share = (LAYERS + HEAD_LAYERS) / hosts
    return LAYERS - round(share - HEAD_LAYERS if output_here else share)


def server_flags(setting: Setting, workers: Sequence[str], variant: Variant) -> list[str]:
    """What `llama-server` is told, the file and the port apart."""
    far = far_layers(setting.nodes, output_here=variant.output_here)
    # The output matrix counts as one layer more, the last one.
    flags = ["--rpc", ",".join(workers), "-ngl", str(far + 1), "-fit", "off", "-ts", ",".join("1" for _ in workers)]
    if variant.output_here:
        flags += ["--override-tensor", "^output=CPU,^token_embd=CPU"]
    flags += ["-c", str(CONTEXT_TOKENS * setting.streams), "-np", str(setting.streams), "-t", "1", "-tb", "1"]
    return [*flags, "--cache-ram", "0", *variant.flags]


@contextmanager
def serving(options: Options, hosts: Sequence[Host], setting: Setting, variant: Variant = PLAIN) -> Iterator[Server]:
    """The peer until the block ends; the caller is on the first host meanwhile.  Raises SkippedError where it is not there."""
    lacking = missing(options)
    if lacking:
        raise SkippedError(lacking)
    folder = Path(options.llama_rpc)
    with ExitStack() as stack:
        processes = [stack.enter_context(_worker(folder, host, n)) for n, host in enumerate(hosts[1:], start=1)]
        workers = [f"{host.address}:{_RPC_PORT}" for host in hosts[1:]]
        flags = ["-m", str(options.gguf), "--host", "127.0.0.1", "--port", str(_HTTP_PORT)]
        command = [str(folder / SERVER), *flags, *server_flags(setting, workers, variant)]
        server = stack.enter_context(_started(hosts[0], command, "llama-server", {}))
        stack.enter_context(hosts[0].inside())
        wait_until(lambda: _is_ready(server), "llama-server ready", _START_LIMIT_S)
        yield Server(port=_HTTP_PORT, model="llama.cpp", pids=(server.pid, *(process.pid for process in processes)))


@contextmanager
def _worker(folder: Path, host: Host, number: int) -> Iterator["subprocess.Popen[bytes]"]:
    cache = SCRATCH / "links" / f"tensors-{number}"
    cache.mkdir(parents=True, exist_ok=True)
    command = [str(folder / WORKER), "-H", host.address, "-p", str(_RPC_PORT), "-t", "1", "-c"]
    with _started(host, command, f"rpc-{number}", {"LLAMA_CACHE": str(cache)}) as process:
        yield process


@contextmanager
def _started(
    host: Host, command: Sequence[str], name: str, extra: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    SCRATCH.joinpath("links").mkdir(parents=True, exist_ok=True)
    with (SCRATCH / "links" / f"{name}.log").open("wb") as log, host.inside(pinned=True):
        process = subprocess.Popen(
            command,
            env={**child_environment(), **extra},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    with ended(process):
        yield process


def _is_ready(server: "subprocess.Popen[bytes]") -> bool:
    if server.poll() is not None:
        log = (SCRATCH / "links" / "llama-server.log").read_text(errors="replace")
        raise RuntimeError(f"llama-server ended with {server.returncode}: {log[-2000:]}")
    client = http.client.HTTPConnection("127.0.0.1", _HTTP_PORT, timeout=2.0)
    try:
        client.request("GET", "/health")
        return client.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        client.close()
