# SPDX-License-Identifier: BSD-3-Clause
"""bcd as a solver of cvxpy (https://www.cvxpy.org): ``problem.solve(solver=bcd.qp.CvxpySolver())``.

cvxpy brings a problem to

    minimise 1/2 x'Px + q'x   subject to   A x = b,  F x <= g,  lower <= x <= upper

with new variables for what stands in squares; :mod:`bcd.recognise` finds sums, bounds and factors in it again.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from bcd.constraints import InfeasibleError
from bcd.objectives import LowRank
from bcd.qp import QP
from bcd.recognise import NotSumBoxError, Recovered, SumBoxForm, recognise
from bcd.result import Result, Status

try:
    import cvxpy.settings as s
    from cvxpy.error import SolverError
    from cvxpy.reductions.solution import Solution, failure_solution
    from cvxpy.reductions.solvers import utilities
    from cvxpy.reductions.solvers.qp_solvers.qp_solver import QpSolver
except ImportError as error:
    raise ImportError("bcd.qp.CvxpySolver needs cvxpy: in a checkout, pip install '.[cvxpy]'") from error

__all__ = ["CvxpySolver"]

OPTIONS = ("tol", "tol_gap", "max_iter", "time_limit", "callback")


@dataclass(frozen=True)
class _Answer:
    """What solve_via_data hands to invert."""

    status: str
    setup_time: float
    result: Result | None = None
    at: Recovered | None = None
    value: float = np.nan
    message: str = ""


class CvxpySolver(QpSolver):
    """A solver object for ``cvxpy.Problem.solve``.

    Takes quadratic objectives under bounds, sums over disjoint sets of variables (with weights, one or several, equal
    to a number or in a range) and equality rows that define variables; says which constraint is outside of that.
    Options of ``solve``: ``tol``, ``tol_gap``, ``max_iter``, ``time_limit``, ``callback`` of :func:`bcd.solve_qp`.
    The solver starts from the last solution of the problem unless ``warm_start=False``.

    All instances are equal, so that a problem with parameters is compiled once though each ``solve`` makes a new one.

    Examples
    --------
    >>> import cvxpy as cp, numpy as np
    >>> w = cp.Variable(3)
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(w - np.array([0.5, 0.8, -1]))), [cp.sum(w) == 1, w >= 0])
    >>> round(problem.solve(solver=CvxpySolver()), 6), w.value.round(6)
    (1.045, array([0.35, 0.65, 0.  ]))
    """

    MIP_CAPABLE = False
    BOUNDED_VARIABLES = True
    STATUS_MAP = {  # noqa: RUF012
        Status.CONVERGED: s.OPTIMAL,
        Status.STAGNATED: s.OPTIMAL_INACCURATE,
        Status.ITERATION_LIMIT: s.USER_LIMIT,
        Status.TIME_LIMIT: s.USER_LIMIT,
        Status.INTERRUPTED: s.USER_LIMIT,
        Status.CALLBACK: s.USER_LIMIT,
        Status.UNBOUNDED: s.UNBOUNDED,
        Status.NOT_FINITE: s.SOLVER_ERROR,
    }

    def name(self) -> str:
        """Name in cvxpy's messages and statistics."""
        return "BCD"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def import_solver(self) -> None:
        """Nothing to import: the solver is here."""

    def cite(self, data: Any) -> str:
        """What to cite, in BibTeX."""
        return (
            "@article{ramesh2023greedy,\n"
            "  title={Analyzing and Improving Greedy 2-Coordinate Updates for Equality-Constrained Optimization via "
            "Steepest Descent in the 1-Norm},\n"
            "  author={Ramesh, Amrutha Varshini and Mishkin, Aaron and Schmidt, Mark and Zhou, Yihan and "
            "Lavington, Jonathan Wilder and She, Jennifer},\n"
            "  journal={arXiv:2307.01169}, year={2023}}"
        )

    def solve_via_data(
        self,
        data: dict[str, Any],
        warm_start: bool,
        verbose: bool,
        solver_opts: dict[str, Any],
        solver_cache: Any = None,
    ) -> _Answer:
        """Solve what :meth:`apply` has made; called by cvxpy.

        Raises
        ------
        cvxpy.error.SolverError
            A constraint is outside of what the solver takes, or the objective is not convex.
        ValueError
            An option is not known.
        """
        options = {name: value for name, value in solver_opts.items() if name != "use_quad_obj"}
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"CvxpySolver has no option {', '.join(unknown)}; it takes {', '.join(OPTIONS)}")
        cache = {} if solver_cache is None else solver_cache
        if not warm_start or self.name() not in cache:
            cache[self.name()] = _Memory()
        try:
            answer = _solve(data, cache[self.name()], options)
        except NotSumBoxError as error:
            raise SolverError(f"{error}. {_constraint(data, error)}") from error
        except ValueError as error:
            raise SolverError(str(error)) from error
        if verbose:
            print(answer.message)
        return answer

    def invert(self, solution: _Answer, inverse_data: Any) -> Solution:
        """Make cvxpy's solution; called by cvxpy."""
        attr: dict[str, Any] = {s.SETUP_TIME: solution.setup_time, s.EXTRA_STATS: solution.result or solution.message}
        if solution.result is not None:
            attr |= {s.SOLVE_TIME: solution.result.seconds, s.NUM_ITERS: solution.result.iterations}
        at = solution.at
        if at is None:
            return failure_solution(solution.status, attr)
        duals: dict[Any, Any] = {}
        for values, constraints in ((at.y, self.EQ_CONSTR), (at.z, self.NEQ_CONSTR)):
            duals |= utilities.get_dual_values(values, utilities.extract_dual_value, inverse_data[constraints])
        value = solution.value + inverse_data[s.OFFSET]
        return Solution(solution.status, value, {self.VAR_ID: at.x}, duals, attr)


class _Memory:
    """The last solve of a problem: what is kept to start the next one from."""

    def __init__(self) -> None:
        self.form: SumBoxForm | None = None
        self.qp: QP | None = None
        self.x: np.ndarray | None = None

    def ready(self, form: SumBoxForm) -> tuple[QP, np.ndarray | None]:
        """The matrix made ready and where to start: where it is the last one, it knows itself."""
        if self.qp is not None and self.form is not None and _same_matrix(self.form, form):
            self.form = form
            return self.qp, None
        self.form, self.qp = form, QP(form.P, weights=form.weights, groups=form.groups)
        return self.qp, None if self.x is None else form.start(self.x)


def _solve(data: dict[str, Any], memory: _Memory, options: dict[str, Any]) -> _Answer:
    started = time.perf_counter()
    try:
        form = recognise(
            data[s.P], data[s.Q], data[s.A], data[s.B], data[s.F], data[s.G], data[s.LOWER_BOUNDS], data[s.UPPER_BOUNDS]
        )
        qp, x0 = memory.ready(form)
        setup = time.perf_counter() - started
        result = qp.solve(form.q, total=form.total, lower=form.lower, upper=form.upper, x0=x0, **options)
    except InfeasibleError as error:
        return _Answer(s.INFEASIBLE, time.perf_counter() - started, message=str(error))
    status = CvxpySolver.STATUS_MAP[result.status]
    if status not in s.SOLUTION_PRESENT:
        return _Answer(status, setup, result, message=result.status.value)
    at = form.restore(result.x, result.total_multipliers, result.bound_multipliers)
    memory.x = at.x
    value = float(0.5 * at.x @ (data[s.P] @ at.x) + data[s.Q] @ at.x)
    return _Answer(status, setup, result, at, value, str(result))


def _same_matrix(a: SumBoxForm, b: SumBoxForm) -> bool:
    """Whether matrix, weights and groups are equal."""
    if type(a.P) is not type(b.P) or not all(_equal(x, y) for x, y in ((a.weights, b.weights), (a.groups, b.groups))):
        return False
    if isinstance(a.P, LowRank):
        return _equal(a.P.shift, b.P.shift) and _equal(a.P.factors, b.P.factors)
    return _equal(a.P, b.P)


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or a is None:
        return a is b
    if a.shape != b.shape:
        return False
    if sp.issparse(a):
        return a.nnz == b.nnz and (a != b).nnz == 0
    return isinstance(a, np.ndarray) and np.array_equal(a, b)


def _constraint(data: dict[str, Any], error: NotSumBoxError) -> str:
    """Which constraint of the compiled problem a row belongs to."""
    kind = "Zero" if error.matrix == "A" else "NonNeg"
    mine = [c for c in data[s.PARAM_PROB].constraints if type(c).__name__ == kind]
    ends = np.cumsum([c.size for c in mine])
    text, found = str(mine[int(np.searchsorted(ends, error.row, side="right"))]), 1
    while found:
        text, found = re.subn(r"\[[^][,:]*\s[^][,:]*\]", "DATA", text)  # arrays, but no subscripts
    return f"It belongs to the constraint {text if len(text) <= 200 else text[:200] + ' ...'}"
