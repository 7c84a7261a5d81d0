# SPDX-License-Identifier: BSD-3-Clause
"""Prediction: decision functions of one model here and in scikit-learn, for few and many rows and support vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import sklearn.svm

from bcd.svm import SVC
from experiments.data import load
from experiments.tables import markdown
from experiments.timing import interleaved

TITLE = "Prediction of SVMs beside scikit-learn's, by rows and support vectors"
SEED = 0
ROUNDS = 9


class Setting(NamedTuple):
    """A data set, how many of its rows train, and the machine."""

    data: str
    rows: int
    C: float
    gamma: float
    kernel: str = "rbf"


SETTINGS = {
    "german": Setting("german_scale", 1000, 1.0, 1 / 24),
    "german, linear": Setting("german_scale", 1000, 1.0, 1.0, "linear"),
    "svmguide1": Setting("svmguide1_scale", 3089, 2.0, 2.0),
    "usps, even": Setting("usps", 7291, 10.0, 2.0**-7),
    "a9a": Setting("a9a", 8000, 32.0, 2.0**-7),
    "ijcnn1": Setting("ijcnn1", 10000, 32.0, 2.0),
}
BATCHES = (1, 10, 100, 5000)


def run(quick: bool) -> dict[str, Any]:
    """Raw seconds of every model and batch; models are fitted by bcd and handed to scikit-learn's class."""
    draw = np.random.default_rng(SEED)
    names = list(SETTINGS)[:3] if quick else list(SETTINGS)
    return {"settings": {name: measure(SETTINGS[name], draw, 3 if quick else ROUNDS) for name in names}}


def measure(setting: Setting, draw: np.random.Generator, rounds: int) -> dict[str, Any]:
    """Both libraries on the same rows, interleaved; and how far their decision values are apart."""
    X, y = load(setting.data)
    y = np.where(y % 2 == 0, 1.0, -1.0) if setting.data == "usps" else y
    chosen = np.sort(draw.permutation(X.shape[0])[: setting.rows])
    X, y = X[chosen], y[chosen]
    options = {"C": setting.C, "gamma": setting.gamma, "kernel": setting.kernel, "tol": 1e-6}
    ours, theirs = SVC(**options).fit(X, y), sklearn.svm.SVC(**options).fit(X, y)
    batches = {}
    for size in BATCHES:
        part = X[: min(size, X.shape[0])]
        works = {"ours": lambda p=part: ours.predict(p), "scikit_learn": lambda p=part: theirs.predict(p)}
        batches[str(part.shape[0])] = interleaved(works, rounds, at_least=0.01)
    return {
        "n_sv": len(ours.support_),
        "features": X.shape[1],
        "largest_difference": float(np.abs(ours.decision_function(X) - theirs.decision_function(X)).max()),
        "batches": batches,
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """One table, "predict"."""
    head = ["model", "support vectors", "rows", "ours, ms", "scikit-learn, ms", "scikit-learn / ours"]
    rows = []
    for name, entry in results["settings"].items():
        for size, times in entry["batches"].items():
            ours, theirs = (1e3 * float(np.median(times[k])) for k in ("ours", "scikit_learn"))
            cells = [f"{entry['n_sv']:,}", f"{int(size):,}", f"{ours:.3g}", f"{theirs:.3g}", f"{theirs / ours:.2f}"]
            rows.append([name, *cells])
    return {"predict": markdown(head, rows)}
