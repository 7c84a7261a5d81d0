# SPDX-License-Identifier: BSD-3-Clause
"""bcd as a solver of qpsolvers (https://qpsolvers.github.io).

    minimise 1/2 x'Px + q'x   subject to   G x <= h,  A x = b,  lb <= x <= ub

as far as :mod:`bcd.recognise` finds sums and bounds in it. ``qpsolvers.solve_qp(..., solver="bcd")`` after
:func:`register_with_qpsolvers`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from bcd.constraints import InfeasibleError
from bcd.objectives import as_hessian
from bcd.qp import QP
from bcd.recognise import SumBoxForm, recognise
from bcd.result import Result, Status

try:
    from qpsolvers import ParamError, Problem, ProblemError, Solution
    from qpsolvers.solvers import available_solvers, dense_solvers, solve_function, sparse_solvers
except ImportError as error:
    raise ImportError(
        "bcd.qp.register_with_qpsolvers needs qpsolvers: in a checkout, pip install '.[qpsolvers]'"
    ) from error

__all__ = ["register_with_qpsolvers", "solve_problem"]

CLOSE = 2e-7  # absolute violation and gap
OPTIONS = ("tol", "tol_gap", "max_iter", "time_limit", "callback")


def register_with_qpsolvers() -> None:
    """Make ``solver="bcd"`` known to ``qpsolvers.solve_qp`` and ``qpsolvers.solve_problem``.

    Calling it again changes nothing.

    Examples
    --------
    >>> import numpy as np, qpsolvers, scipy.sparse as sp
    >>> register_with_qpsolvers()
    >>> P, q, ones = np.diag([1.0, 2.0]), np.array([0.0, -1.0]), np.ones((1, 2))
    >>> qpsolvers.solve_qp(P, q, A=ones, b=np.ones(1), lb=np.zeros(2), solver="bcd").round(6)
    array([0.333333, 0.666667])
    """
    solve_function["bcd"] = solve_problem
    for names in (available_solvers, dense_solvers, sparse_solvers):
        if "bcd" not in names:
            names.append("bcd")


def solve_problem(problem: Problem, initvals: Any = None, verbose: bool = False, **options: Any) -> Solution:
    """Solve a ``qpsolvers.Problem``; what qpsolvers calls for ``solver="bcd"``.

    Parameters
    ----------
    problem : qpsolvers.Problem
    initvals : array of float, shape (n,), optional
        Where to start.
    verbose : bool
        Print the result.
    **options
        ``tol``, ``tol_gap``, ``max_iter``, ``time_limit``, ``callback`` of :func:`bcd.solve_qp`. Without any, a
        solution is refined until violation and gap are 2e-7, relative to nothing, or rounding ends it.

    Returns
    -------
    qpsolvers.Solution
        ``found`` is True where the tolerance was met. ``extras`` has ``status`` (as :class:`bcd.Status` or
        ``"infeasible"``), ``message`` and, if there is a point, ``violation``, ``gap`` and ``iterations``.

    Raises
    ------
    qpsolvers.ParamError
        An option that is not one of those above.
    qpsolvers.ProblemError
        Rows that are no bounds, sums or definitions (the message names one), P not convex, wrong shapes.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ParamError(f"bcd has no option {', '.join(unknown)}; it takes {', '.join(OPTIONS)}")
    solution = Solution(problem, found=False)
    started = time.perf_counter()
    try:
        P, q, G, h, A, b, lb, ub = problem.unpack()
        form = recognise(P, q, A, b, G, h, lb, ub)
        solution.build_time = time.perf_counter() - started
        result = _solve(form, None if initvals is None else form.start(initvals), options)
        solution.solve_time = time.perf_counter() - started - solution.build_time
        _fill(solution, form, result)
    except InfeasibleError as error:
        solution.extras = {"status": "infeasible", "message": str(error)}
    except ValueError as error:
        raise ProblemError(str(error)) from error
    if verbose:
        print(solution.extras["message"])
    return solution


def _solve(form: SumBoxForm, x0: Any, options: dict[str, Any]) -> Result:
    """Without options go on to CLOSE where the numbers allow it: qpsolvers judges by absolute residuals."""
    qp = QP(form.P, weights=form.weights, groups=form.groups)
    given = {"total": form.total, "lower": form.lower, "upper": form.upper}
    result = qp.solve(form.q, **given, x0=x0, **options)
    endless = not np.isfinite(result.gap)  # then the gap that qpsolvers computes is up to |residual|_inf |x|_1
    reach = max(1.0, float(np.abs(result.x).sum())) if endless else 1.0
    off = result.violation * reach if endless else max(result.violation, result.gap)
    if options or not result.status.ok or off <= CLOSE:
        return result
    gradient = as_hessian("P", form.P).product(result.x) + form.q
    tol = min(1e-8, CLOSE / reach / max(1.0, float(np.abs(gradient).max())))  # it is relative to the gradient
    more = qp.solve(form.q, **given, tol=tol, tol_gap=None if endless else CLOSE)
    return replace(more, status=result.status) if more.violation <= result.violation else result


def _fill(solution: Solution, form: SumBoxForm, result: Result) -> None:
    solution.extras = {
        "status": result.status.name.lower(),
        "message": result.status.value if result.status is Status.UNBOUNDED else str(result),
        "violation": result.violation,
        "gap": result.gap,
        "iterations": result.iterations,
    }
    if result.status in (Status.UNBOUNDED, Status.NOT_FINITE):
        return
    solution.found = result.status.ok
    at = form.restore(result.x, result.total_multipliers, result.bound_multipliers)
    solution.x, solution.y, solution.z = at.x, at.y, at.z
    boxed = solution.problem.lb is not None or solution.problem.ub is not None
    solution.z_box = at.z_box if boxed else np.empty(0)
    solution.obj = float(0.5 * at.x @ (solution.problem.P @ at.x) + solution.problem.q @ at.x)
