# SPDX-License-Identifier: BSD-3-Clause
"""The efficient frontier of 500 assets under a factor model of risk."""

import numpy as np

import bcd
from bcd.qp import frontier

rng = np.random.default_rng(3)
market = np.column_stack([rng.uniform(0.5, 1.5, 500), rng.normal(0, 0.4, (500, 9))])  # loadings on 10 factors
risk_model = bcd.LowRank(0.15 * market, rng.uniform(0.1, 0.4, 500) ** 2)  # F F' + diag(D), yearly variances
mean = 0.02 + 0.05 * market[:, 0] + 0.03 * rng.standard_normal(500)

curve = frontier(mean, risk_model, [np.inf, *np.geomspace(300, 0.3, 40)], lower=0, upper=0.1)
print(f"{len(curve.gammas)} portfolios, {curve.status.name}")
print(f"holdings: {curve.holdings[0]} at the least risk, {curve.holdings[-1]} at the most return")
print(f"risk a year: {curve.risk[0]:.1%} to {curve.risk[-1]:.1%}")
curve.plot("portfolio.png")
