# SPDX-License-Identifier: BSD-3-Clause
"""Block coordinate descent under a summation constraint and bounds.

    minimise f(x)   subject to   sum(x) = s,   l <= x <= u          (either constraint may be absent)

>>> import numpy as np, bcd
>>> problem = bcd.Problem(bcd.Quadratic(np.eye(3), [0.0, 1.0, 2.0]), bcd.SumBox(lower=0, total=1))
>>> result = bcd.minimize(problem)
>>> result.x.round(6), bool(result.gap < 1e-6)
(array([1., 0., 0.]), True)
"""

from bcd.constraints import InfeasibleError, SumBox
from bcd.minimize import Progress, minimize
from bcd.objectives import LeastSquares, Logistic, LowRank, NonConvexError, Quadratic, Smooth
from bcd.problem import Problem
from bcd.projection import project_simplex, project_sum_box
from bcd.qp import QP, solve_qp
from bcd.result import Certificate, Result, Status, Trace, certify
from bcd.selection import RULES, Selection, steepest_l1

__version__ = "0.1.0.dev0"

__all__ = [
    "QP",
    "RULES",
    "Certificate",
    "InfeasibleError",
    "LeastSquares",
    "Logistic",
    "LowRank",
    "NonConvexError",
    "Problem",
    "Progress",
    "Quadratic",
    "Result",
    "Selection",
    "Smooth",
    "Status",
    "SumBox",
    "Trace",
    "__version__",
    "certify",
    "minimize",
    "project_simplex",
    "project_sum_box",
    "solve_qp",
    "steepest_l1",
]
