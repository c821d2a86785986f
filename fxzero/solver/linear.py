"""Linear and integer programs in the order in which they are written, solved by HiGHS.

Rows and variables are added one after the other; right-hand sides may be set anew between solves.
HiGHS runs on one thread with a limit on nodes and none on time, so equal programs have equal
answers on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

Vector = NDArray[np.float64]


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
        shape = (len(self.limits), len(self.costs))
        matrix = sparse.csr_matrix((self._entries, (self._rows, self._columns)), shape=shape)
        low, high = np.asarray(self.limits, dtype=float).reshape(-1, 2).T
        options: dict[str, float] = {"mip_rel_gap": relative_gap}
        if nodes is not None:
            options["node_limit"] = nodes
        result = milp(
            np.asarray(self.costs),
            integrality=np.asarray(self.integer, dtype=int) * (not relaxed),
            bounds=Bounds(np.asarray(self.lower), np.asarray(self.upper)),
            constraints=LinearConstraint(matrix, low, high),
            options=options,
        )
        if result.x is None:
            return None
        bound = result.fun if relaxed or not any(self.integer) else result.mip_dual_bound
        return Answer(result.x, float(result.fun), float(result.fun if bound is None else bound))
