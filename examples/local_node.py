"""A node on this machine for the examples: started on free ports, ended with the `with` block.

`SHOAL_URL` set: nothing is started, the gateway there answers (it must have the model).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.client import Shoal
from shoal.fleet.views import DeploymentState

START_LIMIT_S = 60.0
PULL_LIMIT_S = 600.0
LOAD_LIMIT_S = 120.0


def arguments(about: str, *, model: str) -> argparse.Namespace:
    """What every example takes: a model to pull, and a home that may be kept from one run to the next."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", nargs="?", default=model, help="what `shoal pull` takes (default: %(default)s)")
    parser.add_argument(
        "--home", type=Path, help="keep the model and its measurements here; default: a temporary folder"
    )
    return parser.parse_args()


@contextmanager
def local_node(model: str, name: str, home: Path | None = None) -> Iterator[str]:
    """The address of a gateway whose node has *model* under *name*."""
    if os.environ.get("SHOAL_URL"):
        yield os.environ["SHOAL_URL"]
        return
    with tempfile.TemporaryDirectory(prefix="shoal-example-") as temporary:
        where = home or Path(temporary)
        environment = {**os.environ, "SHOAL_HOME": str(where)}
        shoal = [sys.executable, "-m", "shoal"]
        pull = [*shoal, "pull", model, "--name", name]
        if subprocess.run(pull, env=environment, check=False, timeout=PULL_LIMIT_S).returncode:
            raise SystemExit(2)  # it has said why
        running = where / "run" / "node.json"
        running.unlink(missing_ok=True)  # of a node that was killed
        up = [*shoal, "up", "--port", "0", "--listen", "127.0.0.1:0"]
        node = subprocess.Popen(up, env=environment, stdin=subprocess.DEVNULL)
        try:
            yield wait_until_up(node, running)
        finally:
            node.terminate()
            node.wait(timeout=20)


def wait_until_up(node: subprocess.Popen[bytes], running: Path) -> str:
    """A node that runs says in its home how it is reached."""
    end_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end_s and node.poll() is None:
        try:
            return str(json.loads(running.read_text())["url"])
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.05)
    raise SystemExit("the node did not start: its words are above")


def serve(shoal: Shoal, name: str) -> None:
    """Deploy a model and wait until it answers; one that is served already stays as it is."""
    if all(d.name != name for d in shoal.deployments()):
        shoal.deploy(name)
    end_s = time.monotonic() + LOAD_LIMIT_S
    while time.monotonic() < end_s:
        found = next((d for d in shoal.deployments() if d.name == name), None)
        if found is not None and found.state is DeploymentState.READY:
            return
        if found is not None and found.state is DeploymentState.FAILED:
            raise SystemExit(f"{name} cannot be served: {found.detail}")
        time.sleep(0.1)
    raise SystemExit(f"{name} did not come up within {LOAD_LIMIT_S:.0f} s")
