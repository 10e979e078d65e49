"""Answers of a node to questions about itself: what its blocks cost, which links it has, what a model consists of."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
from msgspec.msgpack import Decoder

from shoal.clock import Clock
from shoal.errors import DeadlineExceededError, MalformedFrameError, UnavailableError
from shoal.fleet.faults import restore
from shoal.fleet.report import NodeFacts
from shoal.ids import Digest, NodeId
from shoal.node.artifacts import Artifact, Artifacts, fetch_artifact
from shoal.node.launch import engine_environment
from shoal.node.messages import BlocksOf, Links, ModelBlocks, ProbeLinks, Profiled, ProfileModel
from shoal.node.probe import Dial, measure_links
from shoal.node.trials import METHOD, TrialResult, TrialSpec, trial_spans
from shoal.node.weather import slowdown_of
from shoal.profile.fleet import DeviceProfile
from shoal.store.chunk import parse_digest
from shoal.store.disk import home_named
from shoal.store.fetch import Fetcher
from shoal.store.home import Store
from shoal.transport.parse import parse, shown

_TRIALS_TIMEOUT_S = 150.0
SAMPLES_TURN_WITHIN_S = 10.0
"""Until the samples of a model may be fetched; another fetch may take hours, and a plan waits for us.

With the trials it is less than the asker waits (`planning.PROFILE_TIMEOUT_S`), so that it is told the reason.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurer:
    """Handlers of the calls `profile`, `links` and `blocks`."""

    me: NodeId
    fleet: str
    dial: Dial
    store: Store
    artifacts: Artifacts
    fetcher: Fetcher
    clock: Clock
    threads: int
    facts: Callable[[], NodeFacts]

    async def profile(self, body: bytes) -> bytes:
        """Trials of a model's blocks here: cached by the machine's fingerprint and the model."""
        wanted = parse(body, Decoder(ProfileModel), "ProfileModel")
        if parse_digest(wanted.manifest) is None:  # it becomes part of a file's name
            raise MalformedFrameError(f"{shown(wanted.manifest)!r} is no digest of a model")
        path = self.store.home / "profiles" / f"{self.facts().fingerprint}-{wanted.manifest[:32]}.json"
        cached = None if wanted.again else _cached(path)
        if cached is not None:
            return msgspec.msgpack.encode(Profiled(device=self._device(cached, cached=True)))
        await anyio.to_thread.run_sync(partial(self._fetch_samples, wanted))
        result = await self._run_trials(wanted.manifest)
        await anyio.to_thread.run_sync(partial(_keep, path, result))
        return msgspec.msgpack.encode(Profiled(device=self._device(result, cached=False)))

    async def links(self, body: bytes) -> bytes:
        """Direct links from here to the nodes that are asked for."""
        wanted = parse(body, Decoder(ProbeLinks), "ProbeLinks")
        links = await measure_links(self.dial, self.fleet, self.me, wanted.targets, self.clock)
        return msgspec.msgpack.encode(Links(links=links))

    async def blocks(self, body: bytes) -> bytes:
        """The blocks of a model that this node has."""
        wanted = parse(body, Decoder(ModelBlocks), "ModelBlocks")
        artifact = await anyio.to_thread.run_sync(self.artifacts.open, wanted.manifest)
        return msgspec.msgpack.encode(BlocksOf(spec=artifact.manifest.spec, blocks=artifact.blocks))

    def _fetch_samples(self, wanted: ProfileModel) -> None:
        """Weights to time: a run of blocks, no more than half of what this node may hold, and one block of each kind."""
        fetcher = self.fetcher.with_turn_within(SAMPLES_TURN_WITHIN_S)
        artifact = fetch_artifact(fetcher, self.artifacts, wanted.manifest, wanted.sources)
        names = _sample_tensors(artifact, self.facts().memory_budget_bytes)
        chunks = [entry.chunk for entry in artifact.manifest.tensors if entry.name in names]
        arrived = anyio.from_thread.check_cancelled  # a node that stops does not wait for the rest
        fetcher.model(wanted.manifest, wanted.sources, lambda _: chunks, arrived=lambda _: arrived())

    async def _run_trials(self, manifest: Digest) -> TrialResult:
        facts = self.facts()
        spec = TrialSpec(
            home=str(self.store.home),
            manifest=manifest,
            threads=self.threads,
            slowdown=slowdown_of(self.store.home, facts.slowdown),
            memory_bytes=facts.memory_budget_bytes,
        )
        with anyio.move_on_after(_TRIALS_TIMEOUT_S):
            done = await anyio.run_process(
                [sys.executable, "-m", "shoal.node.trials"],
                input=msgspec.json.encode(spec) + b"\n",
                stdout=subprocess.PIPE,
                stderr=None,
                check=False,
                env={**os.environ, **engine_environment(os.environ, self.threads)},  # timed as it will be served
            )
            if done.returncode != 0:
                raise UnavailableError(
                    f"the trials of {manifest[:12]} ended with exit code {done.returncode}",
                    hint="the node's log says more; was it out of memory?",
                )
            result = msgspec.json.decode(done.stdout, type=TrialResult)
            if result.fault is not None:
                raise restore(result.fault)
            return result
        raise DeadlineExceededError(f"the trials took more than {_TRIALS_TIMEOUT_S:.0f} s")

    def _device(self, result: TrialResult, *, cached: bool) -> DeviceProfile:
        facts = self.facts()
        return DeviceProfile(
            node=self.me,
            fingerprint=facts.fingerprint,
            cores=facts.cores,
            threads=self.threads,
            memory_total_bytes=facts.memory_total_bytes,
            memory_budget_bytes=facts.memory_budget_bytes,
            providers=facts.providers,
            trials=result.trials,
            step_overhead_s=result.step_overhead_s,
            loop_overhead_s=result.loop_overhead_s,
            trials_took_s=result.took_s,
            cached=cached,
        )


def _sample_tensors(artifact: Artifact, memory_bytes: int) -> set[str]:
    spans = trial_spans(artifact.blocks, memory_bytes)
    return {t.name for span in spans for block in artifact.blocks[span.start : span.stop] for t in block.tensors}


def _cached(path: Path) -> TrialResult | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=TrialResult)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None  # absent or of another version: measured again
    return found if found.method == METHOD else None


def _keep(path: Path, result: TrialResult) -> None:
    with home_named(path.parent.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(result))
        temporary.replace(path)
