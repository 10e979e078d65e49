"""When a deployment is planned again: what fails as soon as it is loaded is tried ever more rarely."""

from dataclasses import dataclass, field

from shoal.ids import DeploymentId

RETRY_PLAN_S = 2.0
RETRY_PLAN_AT_MOST_S = 120.0


@dataclass(slots=True)
class Patience:
    """Plans that are under way, and those that came to nothing."""

    _under_way: set[DeploymentId] = field(default_factory=set)
    _not_before_s: dict[DeploymentId, float] = field(default_factory=dict)
    _vain: dict[DeploymentId, int] = field(default_factory=dict)
    """Plans in a row that never came to serve."""

    def allows(self, name: DeploymentId, now_s: float) -> bool:
        """Whether a plan may be begun."""
        return name not in self._under_way and now_s >= self._not_before_s.get(name, 0.0)

    def began(self, name: DeploymentId) -> None:
        """A plan is under way."""
        self._under_way.add(name)

    def counted(self, name: DeploymentId) -> None:
        """A plan was made, or failed: vain until the deployment serves."""
        self._vain[name] = self._vain.get(name, -1) + 1

    def ended(self, name: DeploymentId, now_s: float) -> None:
        """No plan is under way any more."""
        wait_s = RETRY_PLAN_S * 2.0 ** min(self._vain.get(name, 0), 16)
        self._not_before_s[name] = now_s + min(wait_s, RETRY_PLAN_AT_MOST_S)
        self._under_way.discard(name)

    def serves(self, name: DeploymentId) -> None:
        """The last plan was not in vain: when it breaks, the next is made at once."""
        self.forget(name)

    def forget(self, name: DeploymentId) -> None:
        """It was declared anew, or dropped: what it came to before says nothing."""
        self._not_before_s.pop(name, None)
        self._vain.pop(name, None)

    def forget_all(self) -> None:
        """A node has come, or has a model that it lacked: what had no place may have one now."""
        self._not_before_s.clear()
        self._vain.clear()
