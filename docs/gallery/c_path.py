# SPDX-License-Identifier: BSD-3-Clause
"""A path of C: support vectors, and accuracy by cross-validation."""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bcd.svm import SVC

X, y = load_breast_cancer(return_X_y=True)
Z = StandardScaler().fit_transform(X)
path = np.geomspace(0.01, 1000, 16)
machine = SVC(gamma=0.02, warm_start=True)  # every fit starts from the last one
counts, accuracy = [], []
for C in path:
    machine.set_params(C=C).fit(Z, y)
    counts.append([len(machine.support_), np.sum(np.abs(machine.dual_coef_) == C)])
    accuracy.append(cross_val_score(make_pipeline(StandardScaler(), SVC(C=C, gamma=0.02)), X, y, cv=10))
accuracy = np.array(accuracy)
mean, error = accuracy.mean(axis=1), accuracy.std(axis=1, ddof=1) / np.sqrt(10)
best = mean.argmax()
good = np.flatnonzero(mean >= mean[best] - error[best])
print(f"best accuracy {mean[best]:.3f} +- {error[best]:.3f} at C = {path[best]:.3g}")
print(f"within one standard error of it: C = {path[good[0]]:.3g} to {path[good[-1]]:.3g}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.semilogx(path, counts, marker="o", markersize=4, label=["support vectors", "at the bound C"])
left.set(xlabel="C", ylabel="rows", ylim=(0, None))
left.legend()
right.errorbar(path, mean, yerr=error, marker="o", markersize=4, capsize=3)
right.axhline(mean[best] - error[best], color="#888888", linestyle="--", label="best - one standard error")
right.set(xscale="log", xlabel="C", ylabel="accuracy, mean of 10 folds")
right.legend(loc="lower right")
figure.savefig("c_path.png", dpi=144)
