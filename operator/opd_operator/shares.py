"""How many pods and how much of the traffic a canary has at one look, and what the old revision keeps. Pure."""

import math
from dataclasses import dataclass

from opd_operator.observe import DeploymentView


@dataclass(frozen=True)
class Look:
    """A rollout as it is seen: pods, and the percent of the traffic that the canary's step aims at.

    `replicas`: of the endpoint; `surge`: pods beyond them that a rollout may have. `new`: the canary's Deployment.
    `holding`: pods of the old revision that hold a place, those that leave among them.
    """

    replicas: int
    surge: int
    percent: int
    new: DeploymentView | None
    old_ready: int
    holding: int

    @property
    def ready(self) -> int:
        return self.new.ready if self.new else 0

    @property
    def share(self) -> int:
        """Pods of the canary that carry what its step aims at."""
        return math.ceil(self.replicas * self.percent / 100)

    @property
    def floor(self) -> int:
        """Pods that are ready at any time."""
        return self.replicas - (1 - self.surge)

    @property
    def enough(self) -> bool:
        """Whether its pods carry the step. Without surge the last one finds its place only when the old revision has
        left: by then it has all the traffic."""
        if self.new is None:
            return False
        return self.ready >= min(self.share, self.floor) and (self.percent == 100 or self.new.available)

    @property
    def of_ready(self) -> int:
        """Percent of the traffic without a route: one Service spreads it over the ready pods of both."""
        both = self.ready + self.old_ready
        return round(100 * self.ready / both) if both else 0

    @property
    def carried(self) -> int:
        """Percent of the traffic that its ready pods carry, up to the step's; a route's weights are whole percents."""
        if self.enough:
            return self.percent
        whole = self.ready - self.ready % self._in_a_percent
        return min(math.ceil(100 * whole / max(1, self.replicas)), self.percent)

    def relieved(self, followed: int) -> int:
        """Pods of the old revision that carry nothing any more when every gateway follows `followed` percent."""
        return self.replicas * followed // 100 + self._in_a_percent - 1

    def kept(self, relieved: int) -> int:
        """Pods that the old revision keeps: it shrinks only as the new one takes over, to one and not to none."""
        return max(self.floor - relieved, self.replicas - self.share, min(1, self.replicas))

    @property
    def grown(self) -> int:
        """Pods that the canary may have: places that are free, and those it has."""
        made = self.new.replicas if self.new else 0
        return max(min(self.share, self.replicas + self.surge - self.holding), min(self.share, made), 0)

    @property
    def _in_a_percent(self) -> int:
        return max(1, math.ceil(self.replicas / 100))
