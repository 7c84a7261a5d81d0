# SPDX-License-Identifier: BSD-3-Clause
"""The quadratic programs on which solvers are compared.

    minimise 1/2 x'Px + q'x   subject to   sum(x) = total,   lower <= x <= upper

Everything here was fixed before our solver was tuned: sizes, seeds, caps and linear terms. Shares of free variables
at the solution (strictly between their bounds) follow from them and stand in every table. The held-out seed is for
the recorded run alone: nobody looks at it before.

Sizes of the linear terms. Beside the matrix stands a spread in units of 1/n, because weights are about 1/n and with
a fixed linear term the share of free variables would fall with n. Matrices of factor models are in percent squared
a year, and the ill-conditioned spectrum begins at 1, so that gradients are not tiny beside the 1 in max(1, |gradient|),
which tolerances refer to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray

SEEDS = (0, 1, 2)
HELD_OUT = 74_207_281
FACTORS, HUGE_FACTORS = 50, 20
CONDITION = 1e6
MARKET = 16.0  # percent a year, the volatility of the first factor
OTHERS = (8.0, 1.0)  # those of the second and of the last one
IDIOSYNCRATIC = (30.0, 0.35)  # median in percent a year and spread of the logarithm
LIMITS = (10.0, 90.0)


class Factors(NamedTuple):
    """``F F' + diag(D)``: F of shape (n, k), D of shape (n,), both float64."""

    F: Array
    D: Array

    def __matmul__(self, x: Array) -> Array:
        return self.F @ (self.F.T @ x) + self.D * x

    def dense(self) -> Array:
        """The matrix itself, shape (n, n)."""
        P = self.F @ self.F.T
        P[np.diag_indices(len(P))] += self.D
        return P


class Problem(NamedTuple):
    """A quadratic program with one sum.

    Attributes
    ----------
    P : ndarray of float64, shape (n, n), or Factors
        Positive definite; a dense one is symmetric to the last bit.
    q : ndarray of float64, shape (n,)
    total : float
    lower, upper : float or ndarray of float64, shape (n,)
    """

    P: Array | Factors
    q: Array
    total: float = 1.0
    lower: float | Array = 0.0
    upper: float | Array = np.inf

    @property
    def n(self) -> int:
        """Number of variables."""
        return len(self.q)


class Case(NamedTuple):
    """A family at one size; ``make(n, seed)`` is the problem."""

    family: str
    n: int
    make: Callable[[int, int], Problem]

    @property
    def name(self) -> str:
        """As a result file calls it."""
        return f"{self.family}, n = {self.n:,}"


# -- families -----------------------------------------------------------------------------------


def wishart(n: int, seed: int) -> Problem:
    """Sample covariance of 1.22 n normal rows, condition about 400; caps of 20/n; about a tenth is free.

    With the returns' spread at 20/n, the portfolio holds the better tenth of the assets and some at the cap.
    """
    return _sample_covariance(n, seed, rows=1.22, spread=20.0, cap=20.0)


def mostly_free(n: int, seed: int) -> Problem:
    """Sample covariance of 4 n normal rows, condition about 9; caps of 3/n; at least two thirds are free."""
    return _sample_covariance(n, seed, rows=4.0, spread=0.8, cap=3.0)


def _sample_covariance(n: int, seed: int, rows: float, spread: float, cap: float) -> Problem:
    rng = np.random.default_rng([seed, n])
    m = round(rows * n)
    A = rng.standard_normal((n, m))
    return Problem(A @ A.T / m, -spread / n * rng.standard_normal(n), upper=cap / n)


def ill_conditioned(n: int, seed: int) -> Problem:
    """Random orthogonal basis, eigenvalues log-spaced from 1 to 1e6; caps of 5/n; at least a third is free."""
    rng = np.random.default_rng([seed, n])
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    half = basis * np.sqrt(np.geomspace(1.0, CONDITION, n))
    return Problem(half @ half.T, -10.0 / n * rng.standard_normal(n), upper=5.0 / n)


def factor_model(n: int, seed: int, k: int = FACTORS) -> Problem:
    """A market, k - 1 weaker factors and idiosyncratic variances; caps of 20/n; about a tenth is free.

    The returns are those that make the evenly weighted portfolio optimal (reverse optimisation), and alphas on top
    with a spread of 20/n of the mean idiosyncratic variance: without the first part the market's betas would put
    every asset on a bound.
    """
    rng = np.random.default_rng([seed, n, k])
    F = rng.standard_normal((n, k))
    F[:, 0] = 1.0 + 0.3 * F[:, 0]
    F *= np.concatenate([[MARKET], np.geomspace(*OTHERS, k - 1)])
    median, spread = IDIOSYNCRATIC
    D = np.clip(median * np.exp(spread * rng.standard_normal(n)), *LIMITS) ** 2
    P = Factors(F, D)
    implied = P @ np.full(n, 1.0 / n)
    alpha = _alpha_spread(P) * rng.standard_normal(n)
    return Problem(P, -(implied + alpha), upper=20.0 / n)


def _alpha_spread(P: Factors) -> float:
    return 20.0 / len(P.D) * float(P.D.mean())


def huge(n: int, seed: int) -> Problem:
    """The same with 20 factors."""
    return factor_model(n, seed, HUGE_FACTORS)


DENSE, FACTOR, ILL, FREE = "dense, condition 400", "50 factors", "dense, condition 1e6", "dense, most free"
CASES = [
    *(Case(DENSE, n, wishart) for n in (500, 1000, 2000, 4000)),
    *(Case(FACTOR, n, factor_model) for n in (1000, 10_000, 100_000)),
    *(Case(ILL, n, ill_conditioned) for n in (500, 1000, 2000)),
    *(Case(FREE, n, mostly_free) for n in (500, 1000, 2000)),
]
HUGE = Case("20 factors", 1_000_000, huge)
AGAIN = [Case(DENSE, 1000, wishart), Case(FACTOR, 10_000, factor_model)]


# -- the next day -------------------------------------------------------------------------------


def next_day(problem: Problem, seed: int) -> dict[str, Problem]:
    """What may change while P stays: one change at a time, and all of them together.

    The linear term moves by normal steps with a twentieth of the spread of its noise, the total by 1 %, and a tenth
    of the caps falls by a fifth (the bounds become arrays).
    """
    rng = np.random.default_rng([seed, problem.n, 1])
    spread = _alpha_spread(problem.P) if isinstance(problem.P, Factors) else problem.q.std()
    q = problem.q + 0.05 * spread * rng.standard_normal(problem.n)
    upper = np.where(rng.random(problem.n) < 0.1, 0.8, 1.0) * problem.upper
    return {
        "new linear term": problem._replace(q=q),
        "new total": problem._replace(total=1.01 * problem.total),
        "new bounds": problem._replace(upper=upper),
        "all three": problem._replace(q=q, total=1.01 * problem.total, upper=upper),
    }
