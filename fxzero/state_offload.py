"""Chooses whose optimizer state waits in host memory, together with what to recompute.

State that leaves the device makes room in forward, backward and step alike, and costs two copies in
each step.  The program that bounds the price of recompute, with the bytes that leave as one more
variable, says about how many do in the optimum; whole parameters are chosen that have them, and
recompute is planned for the room that there is then:

    budget 300 MiB    state on the host    recompute    copies    step
                        0 MiB              infeasible
                       40 MiB              9 %          3 %       +12 %
                       90 MiB              2 %          7 %        +9 %    <- taken

Invariant: the price is within ``Solution.gap`` of any choice of state and schedule.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

from fxzero.optimizers import OptimizerProfile
from fxzero.solver.bound import Relief
from fxzero.solver.search import Solution, Solver


@dataclass(frozen=True)
class HostStates:
    """Parameters whose state is in host memory.

    Attributes:
        names: of the parameters, in the model's order.
        freed: bytes on the device that are not needed for it.
        seconds: of its way to the device and back, in each step.
    """

    names: tuple[str, ...] = ()
    freed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Proposal:
    """A solver's answer, and the state that it takes to be in host memory."""

    solution: Solution
    states: HostStates


class StateOffload:
    """What state could leave the device.

    Args:
        sizes: bytes of each parameter's state that could, by the parameter's name.
        allowed: whether any may.
        profile: the optimizer's memory when the state of some parameters, by number, has left.
        seconds: of so many bytes to host memory and back.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        allowed: bool,
        profile: Callable[[frozenset[int]], OptimizerProfile],
        seconds: Callable[[int], float],
    ) -> None:
        self.sizes, self.allowed = sizes, allowed
        self._profile, self._seconds = cache(profile), seconds
        self._numbers = {name: number for number, name in enumerate(sizes)}

    @cached_property
    def possible(self) -> HostStates:
        """All that could leave."""
        return self._states(frozenset(name for name, size in self.sizes.items() if size))

    @property
    def all(self) -> HostStates:
        """All that may leave; nothing where the stage for it would need more."""
        return self.possible if self.allowed and self.possible.freed > 0 else HostStates()

    def profile(self, names: tuple[str, ...]) -> OptimizerProfile:
        """The optimizer's memory when the state of these parameters has left."""
        return self._profile(frozenset(self._numbers[name] for name in names))

    def can_leave(self, name: str) -> bool:
        """Whether the state of a parameter can."""
        return bool(self.sizes.get(name))

    @property
    def can_any(self) -> bool:
        """Whether that of any parameter can, or has already."""
        return any(self.sizes.values()) or bool(self.profile(()).host_bytes)

    @property
    def most_transient(self) -> int:
        """Bytes that an update needs besides, whatever has left."""
        ends = self.profile(()), self.profile(self.all.names)
        return max(profile.transient_bytes for profile in ends)

    def seconds(self, names: tuple[str, ...]) -> float:
        """Of the copies of these parameters' state, in each step."""
        size = self.profile(names).host_bytes
        return self._seconds(size) if size else 0.0

    def freeing(self, least: int) -> HostStates | None:
        """Few parameters whose state is ``least`` bytes or more; None: all have less."""
        if least <= 0:
            return HostStates()
        if self.all.freed < least:
            return None
        gross = least
        while True:  # a stage is needed for what leaves
            states = self._states(self._chosen(gross))
            if states.freed >= least:
                return states
            gross += least - states.freed

    def propose(
        self, solver: Solver, solve: Callable[[int], Solution | None], budget: int, least: int
    ) -> Proposal | None:
        """The cheapest way found to stay within ``budget`` bytes.

        Args:
            solve: answers for a budget that nothing has left.
            least: bytes that have to leave for the optimizer's step.
        """
        low = max(least, self._missing(solve, solver, budget))
        fewest = self.freeing(low)
        if fewest is None:
            return None
        solution = solve(budget + fewest.freed)
        if solution is None:
            return None
        best = Proposal(solution, fewest)
        if solution.gap is None or not self.all.freed:
            return best
        price = solver.price_of_seconds(self.all.seconds) / self.all.freed
        least_price = solver.price(solver.everything)
        if solver.price(solution.schedule) <= least_price:
            bound = least_price + price * low
        else:
            steps = solver.fullest(solution.schedule)
            bound, about = solver.relieved(budget, Relief(low, self.all.freed, price), steps)
            more = self.freeing(about) or self.all
            if more.freed > fewest.freed and (other := solve(budget + more.freed)) is not None:
                best = min(best, Proposal(other, more), key=lambda p: self._price(solver, p))
        judged = solver.judge(best.solution.schedule, self._price(solver, best), bound)
        return replace(best, solution=judged)

    def _missing(self, solve: Callable[[int], Solution | None], solver: Solver, budget: int) -> int:
        """Bytes that nothing but state can make room for."""
        if solve(budget) is not None:
            return 0
        peak = solver.smallest.peak
        if solve(max(peak, budget)) is None:  # nothing may be recomputed
            peak = solver.everything.peak
        return max(peak - budget, 0)

    def _price(self, solver: Solver, proposal: Proposal) -> float:
        copies = solver.price_of_seconds(proposal.states.seconds)
        return solver.price(proposal.solution.schedule) + copies

    def _states(self, names: frozenset[str]) -> HostStates:
        ordered = tuple(name for name in self.sizes if name in names)
        freed = self.profile(()).state_bytes - self.profile(ordered).state_bytes
        return HostStates(ordered, freed, self.seconds(ordered))

    def _chosen(self, least: int) -> frozenset[str]:
        """Parameters of ``least`` bytes together and few more, or all.

        The largest that are less than what is missing, one after the other, then the smallest that
        is enough; of all places to end so, that with the least excess.
        """
        rising = sorted((size, name) for name, size in self.sizes.items() if size)
        taken: list[str] = []
        missing, best, excess = least, [name for _, name in rising], float("inf")
        while missing > 0 and rising:
            at = bisect_left(rising, (missing, ""))
            if at < len(rising) and rising[at][0] - missing < excess:
                excess, best = rising[at][0] - missing, [*taken, rising[at][1]]
            if not at:
                break
            size, name = rising.pop(at - 1)
            taken.append(name)
            missing -= size
        return frozenset(best)
