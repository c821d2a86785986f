"""Linear and integer programs in the order in which they are written, solved by HiGHS.

Rows and variables are added one after the other; right-hand sides may be set anew between solves.
HiGHS runs on one thread with a limit on nodes and none on time, so equal programs have equal
answers on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

Vector = NDArray[np.float64]

# Share of its cost by which an integer answer may exceed the best with fractions and be believed.
_DOUBTFUL = 0.1


@dataclass(frozen=True)
class Answer:
    """What a solve came to.

    Attributes:
        values: of the variables, by number.
        cost: the objective at ``values``.
        bound: no choice of values costs less.
    """

    values: Vector
    cost: float
    bound: float


class LinearProgram:
    """Minimise a linear cost over bounded variables under rows of inequalities."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.integer: list[bool] = []
        self.limits: list[tuple[float, float]] = []
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._entries: list[float] = []

    def variable(
        self,
        *,
        cost: float = 0.0,
        lower: float = 0.0,
        upper: float = 1.0,
        integer: bool = False,
    ) -> int:
        """Adds a variable; returns its number."""
        self.costs.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.costs) - 1

    def row(
        self, terms: Mapping[int, float], *, lower: float = -np.inf, upper: float = np.inf
    ) -> int:
        """Adds lower <= sum of coefficient * variable <= upper; returns the row's number."""
        number = len(self.limits)
        self.limits.append((lower, upper))
        self._rows.extend([number] * len(terms))
        self._columns.extend(terms)
        self._entries.extend(terms.values())
        return number

    def limit(self, row: int, upper: float) -> None:
        """Sets a row's upper limit anew."""
        self.limits[row] = (self.limits[row][0], upper)

    def solve(
        self, *, relative_gap: float = 0.0, nodes: int | None = None, relaxed: bool = False
    ) -> Answer | None:
        """The best values found; None if there are none (or none within ``nodes``).

        Args:
            relaxed: whether integer variables may take fractions.
        """
        if not self.costs:
            possible = all(low <= 0 <= high for low, high in self.limits)
            return Answer(np.empty(0), 0.0, 0.0) if possible else None
        if relaxed or not any(self.integer):
            return self._answer(self._run(integer=False))
        options: dict[str, Any] = {"mip_rel_gap": relative_gap}
        if nodes is not None:
            options["node_limit"] = nodes
        answer = self._answer(self._run(**options))
        if self._is_doubtful(answer):
            answer = _cheaper(answer, self._answer(self._run(presolve=False, **options)))
        return answer

    def _is_doubtful(self, answer: Answer | None) -> bool:
        """Whether the answer is far from what fractions would come to.

        HiGHS 1.12's presolve has returned 3.96 as the proven optimum of a program whose optimum was
        0.13, and has called others infeasible.
        """
        loose = self._answer(self._run(integer=False))
        if answer is None or loose is None:
            return loose is not None
        return answer.cost - loose.cost > _DOUBTFUL * abs(answer.cost)

    def _run(self, *, integer: bool = True, **options: float) -> Any:
        shape = (len(self.limits), len(self.costs))
        matrix = sparse.csr_matrix((self._entries, (self._rows, self._columns)), shape=shape)
        low, high = np.asarray(self.limits, dtype=float).reshape(-1, 2).T
        return milp(
            np.asarray(self.costs),
            integrality=np.asarray(self.integer, dtype=int) * integer,
            bounds=Bounds(np.asarray(self.lower), np.asarray(self.upper)),
            constraints=LinearConstraint(matrix, low, high),
            options=options,
        )

    @staticmethod
    def _answer(result: Any) -> Answer | None:
        if result.x is None:
            return None
        bound = result.get("mip_dual_bound")
        return Answer(result.x, float(result.fun), float(result.fun if bound is None else bound))


def _cheaper(one: Answer | None, other: Answer | None) -> Answer | None:
    """The better of two answers, with the bound of the second, which is to be trusted."""
    if one is None or other is None:
        return one or other
    return replace(one if one.cost < other.cost else other, bound=other.bound)
