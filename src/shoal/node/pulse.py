"""Whether tokens come out of a pipeline, end to end: the last one is looked at, and one is asked for where none was for a second.

What such a probe costs counts as nobody's use of the model: it neither wakes what is asleep nor keeps it awake.
"""

from collections.abc import Callable
from dataclasses import dataclass

import anyio
from structlog.typing import FilteringBoundLogger

from shoal.clock import Clock
from shoal.errors import ShoalError
from shoal.fleet.reconcile import Phase
from shoal.ids import RequestId
from shoal.model.spec import ModelKind
from shoal.node.opening import Opened
from shoal.runtime.request import GenerateRequest

IDLE_S = 1.0
PROBE_TIMEOUT_S = 1.5
SIGN_S = 4.0
"""A pipeline that works shows a sign of life every 2 s; twice that long is too long."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """Feels the pulse of opened deployments."""

    clock: Clock
    new_id: Callable[[], str]
    log: FilteringBoundLogger

    def last_token_age_s(self, opened: Opened) -> float | None:
        """Seconds since a token came through every stage; None before the first."""
        last_s = opened.pipeline.last_token_s
        return None if last_s is None else self.clock.now_s() - last_s

    def flows(self, opened: Opened) -> bool:
        """Whether tokens come out: one was seen lately, or a sign of life from a long prompt; or it is no language model."""
        if opened.status.phase is not Phase.SERVING:
            return False
        pipeline = opened.pipeline
        seen_s = pipeline.last_sign_s if pipeline.running else pipeline.last_token_s
        fresh_s = SIGN_S if pipeline.running else IDLE_S + PROBE_TIMEOUT_S
        fresh = seen_s is not None and self.clock.now_s() - seen_s <= fresh_s
        return fresh or opened.served.spec.kind is not ModelKind.CAUSAL_LM

    async def probe_if_idle(self, opened: Opened) -> None:
        """Ask a language model for a token that has given none for a while, unless it is about to fall asleep."""
        if opened.served.spec.kind is not ModelKind.CAUSAL_LM or opened.status.phase is Phase.DROWSY:
            return
        async with opened.probing:  # whoever asks meanwhile waits for that answer, rather than calling it idle
            age_s = self.last_token_age_s(opened)
            if (age_s is None or age_s > IDLE_S) and not opened.pipeline.running:
                await self._probe(opened)

    async def _probe(self, opened: Opened) -> None:
        request = GenerateRequest(
            request=RequestId(f"probe-{self.new_id()}"),
            deployment=opened.served.name,
            prompt=(opened.served.spec.bos_token_id or 0,),
            max_tokens=1,
            ignore_eos=True,
        )
        with anyio.move_on_after(PROBE_TIMEOUT_S):
            try:
                async for _ in opened.executor.generate(request):
                    pass
            except ShoalError as error:
                self.log.warning("probe.failed", deployment=opened.served.name, error=error.message)
