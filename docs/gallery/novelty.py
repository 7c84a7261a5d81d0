# SPDX-License-Identifier: BSD-3-Clause
"""One-class novelty detection: nu bounds the share of training rows outside."""

import matplotlib.pyplot as plt
import numpy as np

from bcd.svm import OneClassSVM

rng = np.random.default_rng(0)
train = np.concatenate([rng.normal([-1.5, 0], 0.5, (200, 2)), rng.normal([1.5, 0.5], [0.9, 0.4], (200, 2))])
new = rng.uniform([-4.5, -2.6], [4.5, 3], (60, 2))
machine = OneClassSVM(nu=0.05, gamma=0.5, tol=1e-6).fit(train)

outside = np.mean(machine.decision_function(train) < -1e-6)
print(f"outside {outside:.1%} <= nu {machine.nu:.1%} <= support vectors {len(machine.support_) / len(train):.1%}")
print(f"{np.sum(machine.predict(new) == -1)} of {len(new)} new rows are novel")

u, v = np.meshgrid(np.linspace(-5, 5, 300), np.linspace(-3, 3.5, 300))
value = machine.decision_function(np.column_stack([u.ravel(), v.ravel()])).reshape(u.shape)
figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
axes.contourf(u, v, value, levels=[0, value.max()], colors=["#d5e6f3"])
axes.contour(u, v, value, levels=[0], colors="#0072B2", linewidths=1.8)
axes.plot(*train.T, ".", color="#555555", markersize=4, label="training rows")
axes.plot(*train[machine.support_].T, "o", markerfacecolor="none", markeredgecolor="#0072B2", label="support vectors")
inlier = machine.predict(new) == 1
axes.plot(*new[inlier].T, "P", color="#009E73", markersize=7, label="new, inside")
axes.plot(*new[~inlier].T, "X", color="#D55E00", markersize=7, label="new, novel")
axes.legend(fontsize=9, loc="upper left", ncols=2)
axes.set(xlabel="feature 1", ylabel="feature 2", ylim=(-3, 4.6))
figure.savefig("novelty.png", dpi=144)
