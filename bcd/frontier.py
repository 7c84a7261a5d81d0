# SPDX-License-Identifier: BSD-3-Clause
"""The efficient frontier: one quadratic program for every aversion to risk, each started at the last one's solution.

    minimise gamma/2 w'Pw - mu'w   subject to   sum(w) = total,   lower <= w <= upper        for gamma in gammas

Divided by gamma the matrix is P for all of them and only the linear term -mu/gamma changes, so P is prepared once
(gamma = inf: the minimum variance). The points are visited from the largest gamma to the smallest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bcd._check import as_vector, check_numeric
from bcd.constraints import SumBox
from bcd.gram import Gram
from bcd.qp import QP
from bcd.result import Result, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Frontier", "frontier"]

Array = np.ndarray
LOOSE = 100  # times the tolerance: where rounding stops the solver later than that, the point is no point of the curve


@dataclass(frozen=True, eq=False)
class Frontier:
    """Portfolios by aversion to risk, in the order of the gammas given; unfinished points are left out.

    Attributes
    ----------
    gammas : ndarray, shape (m,)
        Aversions to risk.
    weights : ndarray, shape (m, n)
        The portfolios.
    risk : ndarray, shape (m,)
        Standard deviations ``sqrt(w'Pw)``.
    expected_return : ndarray, shape (m,)
        ``mu'w``.
    holdings : ndarray of int, shape (m,)
        How many weights are not 0.
    results : list of Result
        The solutions with their certificates, each of the problem divided by gamma.
    status : Status
        CONVERGED if every point was solved to its tolerance; else what ended the run, or STAGNATED where rounding
        did not allow the tolerance at some point. Such points are kept up to 100 times the tolerance (each result
        has its status); one with a larger violation ends the run.
    unfinished : Result or None
        The point at which the run ended, if it ended inside of one or stagnated there (status UNBOUNDED: with its ray).
    seconds : float
        Wall-clock time in all.
    """

    gammas: Array
    weights: Array
    risk: Array
    expected_return: Array
    holdings: Array
    results: list[Result]
    status: Status
    unfinished: Result | None
    seconds: float

    def plot(self, path: str | Path | None = None, *, names: Sequence[str] | None = None, largest: int = 8) -> Figure:
        """Draw return against risk, and what the portfolios along it consist of.

        Parameters
        ----------
        path : path, optional
            Where to save the picture.
        names : sequence of str, length n, optional
            Names of the assets. Default: their numbers.
        largest : int
            How many assets are drawn each by itself, those with the largest weights on average; 9 at most.

        Raises
        ------
        ValueError
            If there is no point to draw, or names are not one an asset.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        if len(self.gammas) == 0:
            raise ValueError("this frontier has no points to draw: the run ended before the first was solved")
        if not 1 <= largest <= 9:
            raise ValueError(f"largest must be between 1 and 9; found {largest}")
        n = self.weights.shape[1]
        names = [f"asset {k}" for k in range(n)] if names is None else names
        if len(names) != n:
            raise ValueError(f"names must be one an asset, {n} in all; found {len(names)}")
        figure = Figure(figsize=(10.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        curve, composition = figure.subplots(1, 2)
        _draw_curve(curve, self)
        _draw_composition(composition, self, names, largest)
        if path is not None:
            figure.savefig(path, dpi=144)
        return figure


def frontier(
    mu: Any,
    risk_model: Any,
    gammas: Any,
    *,
    total: Any = 1.0,
    lower: Any = 0.0,
    upper: Any = None,
    groups: Any = None,
    tol: float = 1e-8,
    time_limit: float | None = None,
    callback: Callable[[float, Result], Any] | None = None,
) -> Frontier:
    """Solve ``min gamma/2 w'Pw - mu'w`` over sums and bounds for every gamma, with warm starts.

    Parameters
    ----------
    mu : array of float, shape (n,)
        Expected returns.
    risk_model : array, scipy sparse array, LowRank or LinearOperator; shape (n, n)
        Covariance P of the returns, as for :func:`bcd.solve_qp`, but no Gram.
    gammas : array of float, shape (m,)
        Aversions to risk, positive, in any order; inf: minimum variance.
    total, lower, upper, groups
        Constraints of every portfolio, as for :func:`bcd.solve_qp`. Default: long only, fully invested.
    tol : float
        The violation to reach, relative to the largest entry of ``|Pw| + |mu|/gamma`` (and to 1 at most) at the
        start, the point solved before, so that daily and yearly covariances are solved alike.
    time_limit : float, optional
        Seconds for all points.
    callback : callable, optional
        ``callback(gamma, result)`` after every point; a true return value ends the run.

    Returns
    -------
    Frontier
        A limit, the callback and Ctrl-C end the run with the points solved so far.

    Raises
    ------
    ValueError
        As for :func:`bcd.solve_qp`, for gammas that are not positive, and for a Gram as risk model.

    Examples
    --------
    >>> from bcd import LowRank
    >>> rng = np.random.default_rng(0)
    >>> risk_model = LowRank(rng.standard_normal((100, 3)), 0.5)
    >>> curve = frontier(rng.random(100), risk_model, [np.inf, 10.0, 1.0, 0.1], upper=0.2)
    >>> curve.weights.shape, curve.status.name
    ((4, 100), 'CONVERGED')
    >>> bool((np.diff(curve.risk) > 0).all() and (np.diff(curve.expected_return) > 0).all())
    True
    """
    started = time.perf_counter()
    if isinstance(risk_model, Gram):
        raise ValueError(
            "risk_model must be an array, a scipy sparse array, bcd.LowRank or a LinearOperator; found a Gram: "
            "give its matrix, or a LinearOperator with its products"
        )
    qp = QP(risk_model, groups=groups)
    mu = as_vector("mu", mu, qp.n)
    gammas = _aversions(gammas)
    product = qp.quadratic.hessian.product
    w = SumBox(lower, upper, total, groups).bind(qp.n).project(np.zeros(qp.n))
    solved: dict[int, Result] = {}
    unfinished, status = None, Status.CONVERGED
    try:
        for k in np.argsort(-gammas, kind="stable"):
            left = None if time_limit is None else time_limit - (time.perf_counter() - started)
            if left is not None and left <= 0:
                status = Status.TIME_LIMIT
                break
            q = -mu / gammas[k]
            size = float((np.abs(product(w)) + np.abs(q)).max())  # of the terms: the gradient itself may be all 0
            fine = tol * (min(1.0, size) or 1.0)
            result = qp.solve(q, total=total, lower=lower, upper=upper, tol=fine, time_limit=left)
            if not result.status.ok and not _nearly(result, LOOSE * fine, product(result.x) + q):
                status, unfinished = result.status, result
                break
            w, solved[int(k)] = result.x, result
            if callback is not None and callback(float(gammas[k]), result):
                status = Status.CALLBACK
                break
    except KeyboardInterrupt:  # between two solves, or the second one during a solve
        status = Status.INTERRUPTED
    if status is Status.CONVERGED and not all(result.status.ok for result in solved.values()):
        status = Status.STAGNATED
    return _gather(mu, product, gammas, solved, status, unfinished, started)


def _nearly(result: Result, tol: float, gradient: Array) -> bool:
    """Whether rounding has stopped the solver within this tolerance."""
    near = result.violation <= tol * max(1.0, float(np.abs(gradient).max()))
    return near and result.status is Status.STAGNATED


def _aversions(gammas: Any) -> Array:
    check_numeric("gammas", gammas)
    values = np.asarray(gammas, dtype=np.float64)
    if values.ndim != 1 or not (values > 0).all():
        raise ValueError(
            "gammas must be a list of positive numbers (inf: minimum variance; small ones: mostly return); "
            f"found {gammas!r}"
        )
    return values


def _gather(
    mu: Array,
    product: Callable[[Array], Array],
    gammas: Array,
    solved: dict[int, Result],
    status: Status,
    unfinished: Result | None,
    started: float,
) -> Frontier:
    """The points in the order given."""
    order = sorted(solved)
    weights = np.array([solved[k].x for k in order]).reshape(len(order), len(mu))
    variance = np.array([w @ product(w) for w in weights])
    return Frontier(
        gammas=gammas[order],
        weights=weights,
        risk=np.sqrt(np.maximum(variance, 0.0)),
        expected_return=weights @ mu,
        holdings=np.count_nonzero(weights, axis=1),
        results=[solved[k] for k in order],
        status=status,
        unfinished=unfinished,
        seconds=time.perf_counter() - started,
    )


def _draw_curve(axes: Axes, curve: Frontier) -> None:
    from bcd.pictures import COLOURS

    order = np.argsort(curve.risk, kind="stable")
    axes.plot(
        curve.risk[order], curve.expected_return[order], color=COLOURS[0], marker="o", markersize=3.5, linewidth=1.6
    )
    ends = [(order[0], "left", "center", (8, 0)), (order[-1], "right", "top", (0, -6))]
    for k, ha, va, shift in ends[: len(order)]:
        name = "minimum variance" if np.isinf(curve.gammas[k]) else f"γ = {curve.gammas[k]:.3g}"
        point = (curve.risk[k], curve.expected_return[k])
        axes.annotate(name, point, shift, textcoords="offset points", ha=ha, va=va, fontsize=9)
    axes.set_xlabel("risk (standard deviation)")
    axes.set_ylabel("expected return")
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_composition(axes: Axes, curve: Frontier, names: Sequence[str], largest: int) -> None:
    """Stacked areas over risk: the largest holdings, then the others; short positions hang below 0."""
    from bcd.pictures import COLOURS

    order = np.argsort(curve.risk, kind="stable")
    weights = curve.weights[order]
    size = np.abs(weights).mean(axis=0)
    top = np.argsort(-size, kind="stable")[:largest]
    top = top[size[top] > 0]
    others = np.delete(weights, top, axis=1)
    labels, colours = [names[k] for k in top], COLOURS[: len(top)]
    if (others != 0).any():
        labels, colours = [*labels, f"{np.count_nonzero((others != 0).any(axis=0))} others"], [*colours, "#D9D9D9"]
    for sign in (1.0, -1.0):
        part = np.maximum(sign * weights[:, top], 0.0)
        rest = np.maximum(sign * others, 0.0).sum(axis=1)
        areas = sign * np.column_stack([part, rest]).T[: len(labels)]
        if sign > 0 or areas.any():
            axes.stackplot(
                curve.risk[order], areas, colors=colours, labels=labels if sign > 0 else (), linewidth=0, alpha=0.9
            )
    axes.margins(x=0, y=0)
    axes.set_xlabel("risk (standard deviation)")
    axes.set_ylabel("weight")
    axes.spines[["top", "right"]].set_visible(False)
    handles, shown = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], shown[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
