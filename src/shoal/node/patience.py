"""When a deployment is planned again: what fails as soon as it is loaded, or as soon as it serves, is tried ever more rarely.

That a deployment serves for a moment proves little: one that dies of its first answer would be loaded, served and lost for ever
at full speed.  Only `STEADY_S` without a break show that its plans are not in vain.  Until then one break is taken for bad luck,
and mended at once; each further one waits, from the break on, for longer than the one before.
"""

from dataclasses import dataclass, field

from shoal.ids import DeploymentId

RETRY_PLAN_S = 2.0
RETRY_PLAN_AT_MOST_S = 120.0
RETRY_ROOM_S = 0.5
STEADY_S = 30.0


@dataclass(slots=True)
class Patience:
    """Plans that are under way, and those that came to nothing."""

    _under_way: set[DeploymentId] = field(default_factory=set)
    _not_before_s: dict[DeploymentId, float] = field(default_factory=dict)
    _vain: dict[DeploymentId, int] = field(default_factory=dict)
    """Plans in a row that never came to serve for long."""
    _serves_since_s: dict[DeploymentId, float] = field(default_factory=dict)
    _postponed: set[DeploymentId] = field(default_factory=set)
    """Those whose plan has to wait for others only."""
    _broke: set[DeploymentId] = field(default_factory=set)
    """Those that were mended at once since they last served for long."""

    def allows(self, name: DeploymentId, now_s: float) -> bool:
        """Whether a plan may be begun."""
        return name not in self._under_way and now_s >= self._not_before_s.get(name, 0.0)

    def began(self, name: DeploymentId) -> None:
        """A plan is under way."""
        self._under_way.add(name)

    def counted(self, name: DeploymentId) -> None:
        """A plan was made, or failed: vain until the deployment has served for a while."""
        self._vain[name] = self._vain.get(name, -1) + 1

    def postponed(self, name: DeploymentId) -> None:
        """There is a plan as soon as others have ended their answers."""
        self._postponed.add(name)

    def ended(self, name: DeploymentId, now_s: float) -> None:
        """No plan is under way any more."""
        if name in self._postponed:
            self._not_before_s[name] = now_s + RETRY_ROOM_S
        else:
            self._wait(name, now_s)
        self._postponed.discard(name)
        self._under_way.discard(name)

    def serves(self, name: DeploymentId, now_s: float) -> None:
        """It serves, now and since it was first said: after a while its last plan was not in vain."""
        if now_s - self._serves_since_s.setdefault(name, now_s) >= STEADY_S:
            self._forgive(name)

    def breaks(self, name: DeploymentId, now_s: float) -> None:
        """It does not serve, or no longer."""
        if self._serves_since_s.pop(name, None) is None:
            return
        if name in self._broke:
            self._wait(name, now_s)
        else:
            self._broke.add(name)
            self._not_before_s.pop(name, None)

    def drains(self, name: DeploymentId) -> None:
        """A node of it leaves: that another plan is needed then says nothing about this one."""
        self._serves_since_s.pop(name, None)

    def forget(self, name: DeploymentId) -> None:
        """It was declared anew, or dropped: what it came to before says nothing."""
        self._forgive(name)
        self._serves_since_s.pop(name, None)

    def forget_all(self) -> None:
        """A node has come, or has a model that it lacked: what had no place may have one now."""
        self._not_before_s.clear()
        self._vain.clear()
        self._broke.clear()

    def _wait(self, name: DeploymentId, now_s: float) -> None:
        wait_s = RETRY_PLAN_S * 2.0 ** min(self._vain.get(name, 0), 16)
        self._not_before_s[name] = now_s + min(wait_s, RETRY_PLAN_AT_MOST_S)

    def _forgive(self, name: DeploymentId) -> None:
        self._not_before_s.pop(name, None)
        self._vain.pop(name, None)
        self._broke.discard(name)
