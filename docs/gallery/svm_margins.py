# SPDX-License-Identifier: BSD-3-Clause
"""The margins of an SVM and the rows that hold them."""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_moons

from bcd.svm import SVC

X, y = make_moons(200, noise=0.25, random_state=0)
machine = SVC(C=1.0, gamma=1.0, tol=1e-6).fit(X, y)

size = np.abs(machine.dual_coef_[0])
at_bound, free = machine.support_[size == machine.C], machine.support_[size < machine.C]  # bounds are hit exactly
margin = y[free] * 2 - 1
print(f"{len(at_bound)} support vectors at the bound C, {len(free)} free")
print(f"free ones are on the margin: y f(x) = 1 to {np.abs(margin * machine.decision_function(X[free]) - 1).max():.0e}")
print(f"dual objective {machine.dual_objective_:.6f}, proven to be within {machine.duality_gap_:.0e} of the optimum")

u, v = np.meshgrid(np.linspace(-1.8, 2.7, 300), np.linspace(-1.4, 1.8, 300))
value = machine.decision_function(np.column_stack([u.ravel(), v.ravel()])).reshape(u.shape)
figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
axes.contourf(u, v, value, levels=[-10, -1, 0, 1, 10], colors=["#9cc5e3", "#d5e6f3", "#f9e3d0", "#f2bf92"])
axes.contour(u, v, value, levels=[-1, 0, 1], colors="#333333", linewidths=[1, 1.8, 1], linestyles=["--", "-", "--"])
for label, colour in ((0, "#0072B2"), (1, "#D55E00")):
    axes.plot(*X[y == label].T, "o", color=colour, markersize=4)
ring = {"linestyle": "", "markerfacecolor": "none", "markersize": 10}
axes.plot(*X[free].T, "o", **ring, markeredgecolor="black", markeredgewidth=1.6, label="free: on the margin")
axes.plot(*X[at_bound].T, "s", **ring, markeredgecolor="#666666", label="at the bound: inside it or on the wrong side")
axes.legend(loc="upper right", fontsize=9)
axes.set(xlabel="feature 1", ylabel="feature 2")
figure.savefig("svm_margins.png", dpi=144)
