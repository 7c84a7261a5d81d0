# SPDX-License-Identifier: BSD-3-Clause
"""SVM solvers in processes of their own: ``python -m experiments.svm_workers SOLVER`` answers requests.

A process holds one solver, so that no thread pool disturbs another's, and a run that takes too long can be ended
from outside (LIBSVM's loop cannot be interrupted). Requests and answers are pickled dicts on the standard streams.
"""

from __future__ import annotations

import gc
import os
import pickle
import resource
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from experiments import FOLDER
from experiments.svm_cases import SEED, Case, load, shaped
from experiments.svm_judge import THREADS, TOL, Machine

SOLVERS = {"ours": "bcd.svm", "scikit-learn": "sklearn.svm", "intelex": "sklearnex.svm", "libsvm-official": "libsvm"}
WARM_ROWS = 1500
CLASSES = {"classify": "SVC", "multi-class": "SVC", "regress": "SVR", "one-class": "OneClassSVM"}
TYPES = {"classify": 0, "multi-class": 0, "regress": 3, "one-class": 2}  # LIBSVM's -s

Array = np.ndarray


# -- solvers ------------------------------------------------------------------------------------


def trainer(solver: str, case: Case, X: Any, y: Array, cache: float) -> Callable[[], Any]:
    """What is timed: a call without arguments that trains and returns the model."""
    if solver == "libsvm-official":
        return _libsvm_trainer(case, X, y, cache)
    estimator = getattr(import_module(SOLVERS[solver]), CLASSES[case.task])
    wanted: dict[str, Any] = {"kernel": "linear"} if case.gamma is None else {"kernel": "rbf", "gamma": case.gamma}
    wanted |= {"nu": case.nu} if case.task == "one-class" else {"C": case.C}
    wanted |= {"epsilon": case.epsilon} if case.task == "regress" else {}
    model = estimator(tol=TOL, cache_size=cache, **wanted)
    return (lambda: model.fit(X)) if case.task == "one-class" else (lambda: model.fit(X, y))


def _libsvm_trainer(case: Case, X: Any, y: Array, cache: float) -> Callable[[], Any]:
    """Generous to this peer: its data structure is built before the clock starts."""
    from libsvm.svmutil import svm_parameter, svm_problem, svm_train

    kernel = "-t 0" if case.gamma is None else f"-t 2 -g {case.gamma!r}"
    own = {"regress": f"-c {case.C!r} -p {case.epsilon!r}", "one-class": f"-n {case.nu!r}"}
    own = own.get(case.task, f"-c {case.C!r}")
    parameter = svm_parameter(f"-s {TYPES[case.task]} {kernel} {own} -m {cache} -e {TOL!r} -q")
    problem = svm_problem(y, sp.csr_matrix(X, dtype=np.float64))
    return lambda: svm_train(problem, parameter)


def machines(solver: str, case: Case, model: Any) -> list[Machine]:
    """A trained model in the form that the judge reads."""
    if solver == "libsvm-official":
        support = np.array(model.get_sv_indices()) - 1
        coef = np.array(model.get_sv_coef(), dtype=np.float64).reshape(len(support), -1).T
        many = case.task in ("classify", "multi-class")
        classes = np.array(model.get_labels(), dtype=np.float64) if many else None
        intercepts = -np.array(model.rho[: coef.shape[0] * (coef.shape[0] + 1) // 2 if many else 1])
        counts = [model.nSV[k] for k in range(len(classes))] if many else None
        return one_against_one(support, coef, intercepts, classes, counts)
    support, coef = np.asarray(model.support_), model.dual_coef_
    coef = np.asarray(coef.toarray() if sp.issparse(coef) else coef, dtype=np.float64)
    intercepts = np.asarray(model.intercept_, dtype=np.float64).ravel()
    classes = np.asarray(model.classes_, dtype=np.float64) if CLASSES[case.task] == "SVC" else None
    if classes is not None and len(classes) == 2:  # scikit-learn turns the sign of two classes, and of two only
        coef, intercepts = -coef, -intercepts
    counts = None if classes is None else np.asarray(model.n_support_).tolist()
    return one_against_one(support, coef, intercepts, classes, counts)


def one_against_one(
    support: Array, coef: Array, intercepts: Array, classes: Array | None, counts: list[int] | None
) -> list[Machine]:
    """LIBSVM's layout taken apart: one machine for every pair of classes (one in all without classes).

    Support vectors stand class by class; of the pair (i, j), i < j, those of class i have their coefficients in
    row j - 1 and those of class j in row i, positive for class i.
    """
    if classes is None or counts is None:
        return [Machine(None, support, coef[0], float(intercepts[0]))]
    ends = np.concatenate([[0], np.cumsum(counts)])
    found = []
    for k, (i, j) in enumerate(combinations(range(len(classes)), 2)):
        at_i, at_j = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
        beta = np.concatenate([coef[j - 1, at_i], coef[i, at_j]])
        sign = 1.0 if classes[i] > classes[j] else -1.0
        low, high = sorted((float(classes[i]), float(classes[j])))
        both = np.concatenate([support[at_i], support[at_j]])
        found.append(Machine((low, high), both, sign * beta, sign * float(intercepts[k])))
    return found


# -- the process --------------------------------------------------------------------------------


class Server:
    """Answers the requests of one solver; keeps the data of the last case."""

    def __init__(self, solver: str):
        self.solver = solver
        self.case: Case | None = None
        self.raw: tuple[Any, Array] | None = None
        self.shapes: dict[str, Any] = {}

    def inputs(self, case: Case, form: str) -> tuple[Any, Array]:
        """Data in a form, loaded once."""
        if self.raw is None or case != self.case:
            self.case, self.raw, self.shapes = case, load(case), {}
        if form not in self.shapes:
            self.shapes[form] = shaped(self.raw[0], form)
        return self.shapes[form], self.raw[1]

    def supports(self, task: str) -> dict[str, Any]:
        """Whether the solver is installed and has an estimator for the task."""
        try:
            module = import_module(SOLVERS[self.solver])
        except ImportError:
            return {"supported": False}
        return {"supported": self.solver == "libsvm-official" or hasattr(module, CLASSES[task])}

    def warm(self, case: Case, form: str) -> dict[str, Any]:
        """Load the data and train on a few rows: imports, compilation and thread pools come before the clock."""
        X, y = self.inputs(case, form)
        kept = np.random.default_rng(SEED).permutation(len(y))[:WARM_ROWS]
        trainer(self.solver, case, X[kept], y[kept], 8.0)()
        return {}

    def fit(self, case: Case, form: str, cache: float) -> dict[str, Any]:
        """Train once and say what it took."""
        train = trainer(self.solver, case, *self.inputs(case, form), cache)
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        model = train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"seconds": wall, "cpu": cpu, "machines": machines(self.solver, case, model)}

    def memory(self, case: Case, form: str, cache: float) -> dict[str, Any]:
        """Megabytes that training adds at its peak to what is resident once the data are loaded and all is warm."""
        self.warm(case, form)
        X, _ = self.inputs(case, form)
        self.raw = (None, self.raw[1]) if self.raw else None
        gc.collect()
        linux = reset_peak()
        before = resident("VmRSS") if linux else peak_so_far()
        answer = self.fit(case, form, cache)
        peak = resident("VmHWM") if linux else peak_so_far()
        size = X.data.nbytes + X.indices.nbytes + X.indptr.nbytes if sp.issparse(X) else X.nbytes
        return {"baseline": before, "peak": peak, "data": size / 2**20, "seconds": answer["seconds"]}


def reset_peak() -> bool:
    """Let the kernel forget the peak so far (Linux); returns whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(field: str) -> float:
    """Megabytes from a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def peak_so_far() -> float:
    """Megabytes, the largest resident size since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(solver: str) -> None:
    """Answer requests from the standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    warnings.simplefilter("ignore")
    server = Server(solver)
    while True:
        try:
            action, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(server, action)(**arguments)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        pickle.dump(answer, answers)
        answers.flush()


# -- the other end ------------------------------------------------------------------------------


class Worker:
    """A process of a solver, started when it is needed and again after it was ended."""

    def __init__(self, solver: str):
        self.solver = solver
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, action: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """The answer to a request, {"over": True} if it takes longer than ``limit`` seconds, {"error": ...}."""
        if self.process is None:
            command = [sys.executable, "-m", "experiments.svm_workers", self.solver]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, cwd=FOLDER.parent, env=surroundings(), bufsize=-1
            )
        pickle.dump((action, arguments), self.process.stdin)
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.close()
            return {"over": True}
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            self.close()
            return {"error": "the process ended"}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def surroundings() -> dict[str, str]:
    """The same environment for everyone: two threads, waiting threads asleep, OpenBLAS free to choose its kernels."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(THREADS))
    return kept | threads | {"OMP_WAIT_POLICY": "passive"}


if __name__ == "__main__":
    serve(sys.argv[1])
