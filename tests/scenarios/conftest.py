"""Real nodes in real processes on loopback, with homes of their own, and a tiny model that loads in no time.

Everything has a bound: a wait that is not fulfilled fails with what was waited for and with the nodes' logs.  Only processes
that a fleet started are ended, by their ids, and all of them are gone when it closes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import openai
import psutil
import pytest
from safetensors.numpy import save_file

from shoal.cli.demo import MODEL as DEMO_MODEL
from shoal.client import Shoal
from shoal.errors import ShoalError
from shoal.fleet.state import Standing
from shoal.fleet.views import DeploymentState, DeploymentView, EventView, NodeView
from shoal.ids import NodeId
from shoal.model.gguf_tokenizer import tokenizer_files
from shoal.node.artifacts import Artifact, open_artifact
from shoal.node.importing import import_files
from shoal.node.progress import Quiet
from shoal.node.pull import PullRequest, pull
from shoal.node.running import Running, running_file
from shoal.node.trials import TrialSpec
from shoal.plan.problem import Pin, Plan, RequestShape
from shoal.profile.device import device_facts, fingerprint
from shoal.store.home import open_store

T = TypeVar("T")

GOLDEN_TEXT = Path(__file__).resolve().parent.parent / "golden" / "text"
TINY = "tiny"
TINY_CONTEXT = 4096
START_S = 45.0
SETTLE_S = 60.0


@dataclass(slots=True)
class Machine:
    """One node: its home stays, its process comes and goes."""

    name: str
    home: Path
    flags: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    running: Running | None = None

    @property
    def id(self) -> NodeId:
        assert self.running is not None
        return self.running.node

    @property
    def url(self) -> str:
        assert self.running is not None
        return self.running.url

    @property
    def address(self) -> str:
        assert self.running is not None
        return self.running.locators[0].removeprefix("tcp/")

    @property
    def log(self) -> str:
        path = self.home / "node.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start the node, again at the address that others know; `wait_up` tells when it runs."""
        flags = self.flags
        if self.running is not None:
            at = flags.index("--listen") + 1
            flags = (*flags[:at], self.address, *flags[at + 1 :])
        running_file(self.home).unlink(missing_ok=True)
        with (self.home / "node.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shoal", *flags],
                env={**clean_environment(), "SHOAL_HOME": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_up(self) -> None:
        self.running = wait_for(self._is_up, f"node {self.name} is up", START_S, [self])

    def _is_up(self) -> Running | None:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"node {self.name} ended with {self.process.returncode}:\n{self.log}")
        try:
            return msgspec.json.decode(running_file(self.home).read_bytes(), type=Running)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, oldest first."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        return [p for p in children if p.status() != psutil.STATUS_ZOMBIE and "shoal.node.worker" in p.cmdline()]

    def kill(self) -> None:
        """kill -9: no farewell."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """By SIGTERM, and harder if that does not help; its workers must then be gone too."""
        if self.process is None:
            return
        workers = _alive_children(self.process)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in psutil.wait_procs(workers, timeout=6)[1]:
            process.kill()


def _alive_children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def clean_environment() -> dict[str, str]:
    """Ours without what would steer a node."""
    return {k: v for k, v in os.environ.items() if not k.startswith("SHOAL_")} | {"OMP_NUM_THREADS": "1"}


def wait_for(ask: Callable[[], T | None], what: str, limit_s: float, machines: list[Machine] | None = None) -> T:
    """The first answer of *ask* that is neither None nor False; fails the test with *what* after *limit_s*."""
    until_s = time.monotonic() + limit_s
    seen: object = None
    while time.monotonic() < until_s:
        try:
            answer = ask()
            if answer is not None and answer is not False:
                return answer
            seen = answer
        except ShoalError as error:
            seen = error
        time.sleep(0.05)
    logs = "\n".join(f"--- {m.name}\n{m.log[-3000:]}" for m in machines or [])
    pytest.fail(f"not within {limit_s:g} s: {what} (last: {seen})\n{logs}")


@dataclass(slots=True)
class Fleet:
    """Nodes of one test; the first is the one that is asked."""

    base: Path
    stock: "Stock"
    machines: list[Machine] = field(default_factory=list)
    clients: ExitStack = field(default_factory=ExitStack)
    stopped: list[Plan] = field(default_factory=list)

    def machine(self, name: str) -> Machine:
        return next(m for m in self.machines if m.name == name)

    def up(self, name: str, *flags: str, models: tuple[str, ...] = (TINY,), settings: str = "") -> Machine:
        """A node with a gateway that may coordinate; *settings* go to its file."""
        return self.add(name, "up", "--port", "0", *flags, models=models, settings=settings)

    def join(self, name: str, *flags: str, to: tuple[Machine, ...] = (), models: tuple[str, ...] = ()) -> Machine:
        """A node that joins *to*, by default the first one."""
        addresses = [m.address for m in to or (self.machines[0],)]
        return self.add(name, "join", *addresses, *flags, models=models)

    def add(self, name: str, command: str, *flags: str, models: tuple[str, ...] = (), settings: str = "") -> Machine:
        home = self.base / name
        self.stock.furnish(home, models)
        if settings:
            (home / "settings.toml").write_text(settings)
        machine = Machine(name, home, (command, *flags, "--name", name, *_defaults(flags)))
        self.machines.append(machine)
        machine.start()
        return machine

    def site(self, *others: str) -> list[Machine]:
        """Node `a` with the gateway and the tiny model, and *others*, all alive."""
        first = self.up("a")
        first.wait_up()
        machines = [first, *(self.join(name) for name in others)]
        for machine in machines[1:]:
            machine.wait_up()
        self.wait_alive(*(m.name for m in machines))
        return machines

    @contextmanager
    def asking(self, machine: Machine | None = None) -> Iterator[Shoal]:
        with Shoal((machine or self.machines[0]).url, timeout_s=15.0) as shoal:
            yield shoal

    def openai(self, machine: Machine | None = None) -> openai.OpenAI:
        url = (machine or self.machines[0]).url
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        return self.clients.enter_context(client)

    def nodes(self, at: Machine | None = None) -> dict[str, NodeView]:
        with self.asking(at) as shoal:
            return {n.name: n for n in shoal.nodes()}

    def events(self, at: Machine | None = None) -> tuple[EventView, ...]:
        with self.asking(at) as shoal:
            return shoal.events(limit=1000)

    def wait(self, ask: Callable[[], T | None], what: str, limit_s: float = SETTLE_S) -> T:
        return wait_for(ask, what, limit_s, self.machines)

    def wait_alive(self, *names: str, at: Machine | None = None) -> None:
        def alive() -> bool:
            found = {n for n, view in self.nodes(at).items() if view.standing is Standing.ALIVE}
            return set(names) <= found

        self.wait(alive, f"{', '.join(names)} are alive", START_S)

    def deployment(self, name: str, at: Machine | None = None) -> DeploymentView | None:
        with self.asking(at) as shoal:
            return next((d for d in shoal.deployments() if d.name == name), None)

    def deploy(
        self,
        name: str,
        *places: Machine,
        model: str = TINY,
        at: Machine | None = None,
        context_tokens: int = TINY_CONTEXT,
        slots: int = 2,
        free: bool = False,
        most_on_last: bool = False,
        wait: bool = True,
    ) -> DeploymentView | None:
        """Serve *model* as *name*, one stage on each of *places* (*free*: that many stages, wherever the planner likes).

        *most_on_last*: the last of two places has all blocks but the first.
        """
        shape = RequestShape(tokens_in=8, tokens_out=16, context_tokens=context_tokens, slots=slots)
        pins = () if free else tuple(Pin(block=i, node=m.id) for i, m in enumerate(places[:1]))
        pins += () if free or len(places) < 2 else (Pin(block=self.stock.blocks(model) - 1, node=places[-1].id),)
        pins += (Pin(block=1, node=places[-1].id),) if most_on_last else ()
        with self.asking(at) as shoal:
            shoal.deploy(model, name=name, shape=shape, stages=len(places), pins=pins)
        return self.wait_ready(name, at=at) if wait else None

    def stop(self, name: str) -> None:
        """End a deployment and wait until its workers are gone."""
        before = self._workers()
        self.stopped.append(self.deployment(name).plan)
        stages = len(self.stopped[-1].stages)
        with self.asking() as shoal:
            shoal.stop(name)
        self.wait(lambda: self._workers() <= before - stages, f"the workers of {name} have ended")

    def _workers(self) -> int:
        return sum(len(m.workers()) for m in self.machines)

    def wait_ready(
        self, name: str, *, after: DeploymentView | None = None, at: Machine | None = None
    ) -> DeploymentView:
        """Until it is ready: planned, or mended, once more than in *after*."""
        before = (after.plan_epoch, after.mends) if after is not None else (0, -1)

        def ready() -> DeploymentView | None:
            view = self.deployment(name, at)
            is_new = view is not None and (view.plan_epoch, view.mends) > before
            return view if view and view.state is DeploymentState.READY and is_new else None

        return self.wait(ready, f"deployment {name} is ready with an epoch and mends above {before}")

    def dismiss(self, machine: Machine) -> None:
        """End a node for good."""
        machine.end()
        self.machines.remove(machine)

    def close(self) -> None:
        self.clients.close()
        for machine in reversed(self.machines):
            machine.end()


def _defaults(flags: tuple[str, ...]) -> tuple[str, ...]:
    wanted = {"--threads": "1", "--memory": "2GiB", "--listen": "127.0.0.1:0"}
    return tuple(part for flag, value in wanted.items() if flag not in flags for part in (flag, value))


@dataclass(slots=True)
class Stock:
    """What homes are furnished with: models that were imported once, and profiles that were measured once."""

    base: Path
    sources: dict[str, Callable[[], Path]]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def profiles(self) -> Path:
        return self.base / "profiles"

    def furnish(self, home: Path, models: tuple[str, ...]) -> None:
        """Make *home* unless it is there (a node that comes back)."""
        if home.exists():
            return
        home.mkdir(parents=True)
        for model in models:
            self.put(home, model)
        for model in {TINY, *models}:
            self.profile(model)
        shutil.copytree(self.profiles, home / "profiles")

    def put(self, home: Path, model: str) -> None:
        """What `shoal pull` leaves behind; the node of *home* may be running."""
        for folder in ("chunks", "derived", "models"):
            source = self.imported(model) / folder
            if source.exists():
                shutil.copytree(source, home / folder, copy_function=_link, dirs_exist_ok=True)

    def profile(self, model: str) -> None:
        """Measure this machine with one thread, once, as a node would: nodes find the result in their cache."""
        home = self.imported(model)
        digest = open_store(home).library.digest(model)
        machine = fingerprint(device_facts(f"onnxruntime {version('onnxruntime')}"), 1, ())
        path = self.profiles / f"{machine}-{digest[:32]}.json"
        if path.exists():
            return
        spec = msgspec.json.encode(TrialSpec(home=str(home), manifest=digest, threads=1, memory_bytes=2 << 30))
        trials = [sys.executable, "-m", "shoal.node.trials"]
        done = subprocess.run(
            trials, input=spec + b"\n", capture_output=True, timeout=300, env=clean_environment(), check=True
        )
        self.profiles.mkdir(exist_ok=True)
        path.write_bytes(done.stdout)

    def imported(self, model: str) -> Path:
        home = self.base / model
        if not home.exists():
            request = PullRequest(reference=str(self.sources[model]()), name=model)
            pull(open_store(home), request, import_files, Quiet())
        return home

    def blocks(self, model: str) -> int:
        if model not in self.counts:
            self.counts[model] = len(self.artifact(model).blocks)
        return self.counts[model]

    def artifact(self, model: str) -> Artifact:
        store = open_store(self.imported(model))
        return open_artifact(store, store.library.digest(model))


def _link(source: str, target: str) -> None:
    if not Path(target).exists():
        os.link(source, target)


def tokenizer() -> tuple[dict[str, bytes], int]:
    """Files of the recorded byte-level tokenizer, with `<s>` and `</s>` before its tokens; and how many tokens it has."""
    recorded = json.loads((GOLDEN_TEXT / "byte_level.json").read_text(encoding="utf-8"))
    tokens = ["<s>", "</s>", *recorded["tokens"]]
    files = tokenizer_files(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3, 3] + [1] * len(recorded["tokens"]),
            "tokenizer.ggml.merges": recorded["merges"],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        }
    )
    return files, len(tokens)


def make_bert(folder: Path) -> Path:
    """The recorded tiny encoder with a tokenizer, which it needs to be served (requests may send ids)."""
    shutil.copytree(GOLDEN_TEXT.parent / "bert", folder)
    for name, data in tokenizer()[0].items():
        (folder / name).write_bytes(data)
    return folder


def make_tiny(folder: Path, layers: int = 6) -> Path:
    """A random llama with a byte-level tokenizer, as a Hugging Face folder: small, but it answers at length and in text."""
    files, vocabulary = tokenizer()
    hidden, inner, heads, kv_heads = 64, 96, 4, 2
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": TINY_CONTEXT, "vocab_size": vocabulary, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    drawn = 0

    def weight(*shape: int, scale: float = 0.2) -> np.ndarray:
        """Numbers that look random, of the given spread."""
        nonlocal drawn
        at = np.arange(drawn, drawn + int(np.prod(shape)), dtype=np.float64)
        drawn += at.size
        spread = np.sin(at * 12.9898) * 43758.5453 % 1 - 0.5
        return (spread * scale * 12**0.5).astype(np.float32).reshape(shape)

    tensors = {
        "model.embed_tokens.weight": weight(vocabulary, hidden, scale=1),
        "lm_head.weight": weight(vocabulary, hidden, scale=0.5),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    tensors["lm_head.weight"][:2] = (
        0  # neither <s> nor </s> is ever the likeliest: answers have the length that is asked for
    )
    kv = hidden * kv_heads // heads
    for n in range(layers):
        at = f"model.layers.{n}"
        tensors |= {
            f"{at}.{name}.weight": np.ones(hidden, np.float32)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        shapes = {
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
        }
        tensors |= {f"{at}.self_attn.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        tensors |= {f"{at}.mlp.{name}.weight": weight(*shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Stock:
    base = tmp_path_factory.mktemp("stock")
    sources = {
        TINY: lambda: make_tiny(base / "tiny-source"),
        "bert": lambda: make_bert(base / "bert-source"),
        DEMO_MODEL: lambda: request.getfixturevalue("smollm2_gguf"),
        "smollm2": lambda: request.getfixturevalue("smollm2_gguf"),
    }
    return Stock(base, sources)


@pytest.fixture(scope="session")
def fleets(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> Callable[[ExitStack], Fleet]:
    """Make a fleet that ends with the given stack."""

    def make(stack: ExitStack) -> Fleet:
        fleet = Fleet(tmp_path_factory.mktemp("fleet"), stock)
        stack.callback(fleet.close)
        return fleet

    return make


@pytest.fixture
def fleet(fleets: Callable[[ExitStack], Fleet]) -> Iterator[Fleet]:
    """An empty fleet for one test."""
    with ExitStack() as stack:
        yield fleets(stack)


@pytest.fixture(scope="session")
def three_nodes(fleets: Callable[[ExitStack], Fleet]) -> Iterator[Fleet]:
    """Nodes a, b, c, and the tiny model as `two` in two stages of which the first is on a.  Whoever borrows it gives it back so."""
    with ExitStack() as stack:
        fleet = fleets(stack)
        first, *_ = fleet.site("b", "c")
        fleet.deploy("two", first, first, free=True)
        yield fleet
