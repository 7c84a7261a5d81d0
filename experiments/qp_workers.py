# SPDX-License-Identifier: BSD-3-Clause
"""QP solvers in processes of their own, which answer requests through a pipe.

A process holds one solver, so that no thread pool disturbs another's and that a run that takes too long, or a crash,
ends that process alone. The peers are called through qpsolvers. What their matrices look like is settled before the
clock starts; the clock then runs over one call of qpsolvers' function for the solver or of ``bcd.solve_qp``, checks
included, and for factor models over the construction of ``bcd.LowRank`` as well. What qpsolvers does before it starts
the solver (conversions; with clarabel, piqp and osqp the solver's own setup too) is kept as ``build``.

Forms. Of a dense problem: the array ("dense"), or a sparse matrix that holds all entries ("csc"). Of a factor model:
its matrix formed ("dense"), or with auxiliary variables y = F'x ("factor"):

    minimise 1/2 (x'Dx + y'y) + q'x   subject to   sum(x) = total,   F'x - y = 0,   lower <= x <= upper

qpsolvers hands proxqp its bounds as n general constraints; in the form "dense, box" proxsuite itself is called, which
then knows that they are bounds.

Besides there is a reference that is no peer: plain greedy pairs, ``bcd.minimize(problem, rule="wss2")``.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from experiments.qp_judge import TOL
from experiments.qp_problems import Factors, Problem, factor_model, wishart
from experiments.svm_workers import peak_so_far, reset_peak, resident, surroundings

THREADS = 2
HUGE_TOL = 1e-6
PRODUCTS = 100  # with F or F', by turns
EPS = tuple(float(f"1e-{k}") for k in range(3, 15))  # the ladder of settings, loosest first
MANY = 10**6  # iterations of the first-order and active-set solvers
OURS, GREEDY = "ours", "greedy pairs"
FORMS = {  # "csc" becomes "factor" for a factor model; the quick ones first, which tell what is slow
    "piqp": ("dense", "csc"),
    "highs": ("csc",),  # its active-set solver; the interior point one is not in the package
    "clarabel": ("csc, faer", "csc, qdldl"),
    "scs": ("csc, sparse", "csc, dense"),
    "osqp": ("csc, polished", "csc, plain"),
    "daqp": ("dense",),
    "proxqp": ("dense, box", "dense", "csc"),
    "quadprog": ("dense",),
}
PEERS = tuple(FORMS)

Array = np.ndarray
Answer = dict[str, Any]


def forms(solver: str, factors: bool) -> tuple[str, ...]:
    """The forms that a peer takes; for a factor model the sparse one, and the dense one where it has a dense part."""
    return tuple(form.replace("csc", "factor") if factors else form for form in FORMS[solver])


def ladder(solver: str) -> tuple[float, ...]:
    """The settings to try: quadprog has no tolerance."""
    return (np.nan,) if solver == "quadprog" else EPS


def options(solver: str, form: str, eps: float, cap: float) -> dict[str, Any]:
    """What a peer is told: its tolerances at eps, and no limit of iterations that could come before."""
    if solver == "clarabel":
        tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), eps)
        return tolerances | {"max_iter": 1000, "max_threads": THREADS, "direct_solve_method": form.split(", ")[1]}
    if solver == "piqp":
        names = ("eps_abs", "eps_rel", "eps_duality_gap_abs", "eps_duality_gap_rel")
        return dict.fromkeys(names, eps) | {"check_duality_gap": True, "max_iter": 1000}
    if solver == "proxqp":
        return {"eps_abs": eps, "eps_rel": 0.0, "max_iter": 100_000}
    if solver == "osqp":
        polishing = form.endswith("polished")
        return {"eps_abs": eps, "eps_rel": eps, "max_iter": MANY, "polishing": polishing, "time_limit": cap}
    if solver == "daqp":
        return {"primal_tol": eps, "dual_tol": eps, "iter_limit": MANY}
    if solver == "highs":
        names = ("primal_feasibility_tolerance", "dual_feasibility_tolerance")
        exact = {"qp_regularization_value": 0.0}  # what it adds to P otherwise costs accuracy
        return dict.fromkeys(names, max(eps, 1e-10)) | exact | {"threads": THREADS, "time_limit": cap}  # takes no less
    if solver == "scs":
        kind = {"linear_solver": "cpu_dense"} if form.endswith("dense") else {}
        return kind | {"eps_abs": eps, "eps_rel": eps, "max_iters": MANY, "time_limit_secs": cap}
    return {}


# -- what is timed ------------------------------------------------------------------------------


def our_matrix(problem: Problem) -> Any:
    """P as a user of solve_qp writes it."""
    import bcd

    return bcd.LowRank(*problem.P) if isinstance(problem.P, Factors) else problem.P


def our_call(problem: Problem, tol: float = TOL) -> Callable[[], Any]:
    """The call of ours."""
    import bcd

    q, total, lower, upper = problem[1:]
    return lambda: bcd.solve_qp(our_matrix(problem), q, total=total, lower=lower, upper=upper, tol=tol)


def greedy_call(problem: Problem, tol: float, cap: float) -> Callable[[], Any]:
    """The call of plain greedy pairs; its tolerance is absolute."""
    import bcd

    def work() -> Any:
        feasible = bcd.SumBox(problem.lower, problem.upper, total=problem.total)
        whole = bcd.Problem(bcd.Quadratic(our_matrix(problem), problem.q), feasible)
        return bcd.minimize(whole, rule="wss2", tol=tol, time_limit=cap)

    return work


class BoxAnswer(NamedTuple):
    """What proxsuite returned, under the names that qpsolvers uses."""

    x: Array
    found: bool
    build_time: float = 0.0


def proxqp_box_call(formed: Any, settings: dict[str, Any]) -> Callable[[], BoxAnswer]:
    """Proxsuite's dense solver with bounds that it knows to be bounds."""
    from proxsuite import proxqp

    P, q, _, _, A, b, lower, upper = formed.unpack()

    def work() -> BoxAnswer:
        qp = proxqp.dense.QP(len(q), len(b), 0, box_constraints=True)
        for name, value in settings.items():
            setattr(qp.settings, name, value)
        qp.init(P, q, A, b, None, None, None, lower, upper)
        qp.solve()
        return BoxAnswer(qp.results.x, qp.results.info.status == proxqp.QPSolverOutput.PROXQP_SOLVED)

    return work


def peer_problem(problem: Problem, form: str) -> Any:
    """The problem in a form, as qpsolvers takes it."""
    import qpsolvers

    n, q = problem.n, problem.q
    lower, upper = (np.full(n, b) if np.ndim(b) == 0 else b for b in (problem.lower, problem.upper))
    if form.startswith("factor"):
        F, D = problem.P
        k = F.shape[1]
        P = sp.diags_array(np.concatenate([D, np.ones(k)])).tocsc()
        top = sp.hstack([sp.csc_array(np.ones((1, n))), sp.csc_array((1, k))])
        A = sp.vstack([top, sp.hstack([sp.csc_array(F.T), -sp.eye_array(k)])])
        open_end = np.full(k, np.inf)
        q, b = np.concatenate([q, np.zeros(k)]), np.concatenate([[problem.total], np.zeros(k)])
        lower, upper = np.concatenate([lower, -open_end]), np.concatenate([upper, open_end])
        return qpsolvers.Problem(sp.csc_matrix(P), q, A=sp.csc_matrix(A), b=b, lb=lower, ub=upper)
    P = problem.P.dense() if isinstance(problem.P, Factors) else problem.P
    A, b = np.ones((1, n)), np.array([problem.total])
    if form.startswith("csc"):
        P, A = sp.csc_matrix(P), sp.csc_matrix(A)
    return qpsolvers.Problem(P, q, A=A, b=b, lb=lower, ub=upper)


# -- the process --------------------------------------------------------------------------------


class Server:
    """Answers the requests of one solver; keeps the last problem in its last form."""

    def __init__(self, solver: str):
        self.solver = solver
        self.key: tuple[str, str] | None = None
        self.problem: Any = None
        self.n = 0

    def prepare(self, path: str, form: str) -> Answer:
        """Read a problem and bring it into a form; small ones are solved when the process is new."""
        if self.key is None:
            for small, of in (
                (factor_model(100, 0), form.replace("csc", "factor")),
                (wishart(100, 0), form.replace("factor", "csc")),
            ):
                self._call(self._formed(small, of), of, 1e-3, 60.0)()
        if self.key != (path, form):
            self.problem = None
            gc.collect()
            problem = read(path)
            self.problem, self.n, self.key = self._formed(problem, form), problem.n, (path, form)
        return {}

    def _formed(self, problem: Problem, form: str) -> Any:
        return problem if self.solver in (OURS, GREEDY) else peer_problem(problem, form)

    def _call(self, formed: Any, form: str, eps: float, cap: float) -> Callable[[], Any]:
        if self.solver == OURS:
            return our_call(formed)
        if self.solver == GREEDY:
            return greedy_call(formed, eps, cap)
        from qpsolvers.solvers import solve_function

        if self.solver not in solve_function:  # qpsolvers knows what can be imported
            raise ModuleNotFoundError(f"{self.solver} is not installed")
        settings = options(self.solver, form, eps, cap)
        if form.endswith("box"):
            return proxqp_box_call(formed, settings)
        return lambda: solve_function[self.solver](formed, **settings)

    def fit(self, path: str, form: str, eps: float, cap: float, calls: int, warm: bool = False) -> Answer:
        """Seconds of one of ``calls`` calls in a row, and the point; ``warm``: one more call comes before them.

        ``first`` is what the first of all these calls took, when caches hold what others left in them.
        """
        self.prepare(path, form)
        work = self._call(self.problem, form, eps, cap)
        gc.collect()
        first = _seconds(work) if warm else None
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            answer = work()
        wall, cpu = (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
        if answer.x is None:
            return {"error": "no point"}
        taken = {"seconds": wall, "cpu": cpu, "first": wall if first is None else first}
        return taken | {"x": np.asarray(answer.x)[: self.n]} | self._said(answer)

    def _said(self, answer: Any) -> Answer:
        """Status and iterations of ours, status and build time of a peer."""
        if self.solver in (OURS, GREEDY):
            return {"said": answer.status.name, "iterations": answer.iterations}
        return {"said": "solved" if answer.found else "not solved", "build": answer.build_time or 0.0}

    def again(self, path: str, new_path: str, rounds: int) -> Answer:
        """Ours: seconds from the last point, of a fresh call, and of a fresh point with the matrix made ready."""
        import bcd

        old, new = read(path), read(new_path)
        P, fresh_call = our_matrix(old), our_call(new)
        times: dict[str, list[float]] = {"again": [], "fresh": [], "ready": []}
        for _ in range(rounds + 1):
            qp, ready = bcd.QP(P), bcd.QP(P)
            solve(qp, old)
            for name, work in (
                ("again", lambda qp=qp: solve(qp, new)),
                ("fresh", fresh_call),
                ("ready", lambda qp=ready: solve(qp, new)),
            ):
                began = time.perf_counter()
                result = work()
                times[name].append(time.perf_counter() - began)
                if name == "again":
                    x = result.x
        return {name: values[1:] for name, values in times.items()} | {"x": x}

    def huge(self, path: str, rounds: int) -> Answer:
        """Ours: seconds and megabytes of a solve, and seconds of products with F, in turns."""
        our_call(factor_model(2000, 0, 20), HUGE_TOL)()
        problem = read(path)
        work, v = our_call(problem, HUGE_TOL), np.full(problem.n, 1.0 / problem.n)
        solves, products, peak = [], [], 0.0
        for turn in range(rounds):
            products.append(_seconds(lambda: [problem.P.F @ (problem.P.F.T @ v) for _ in range(PRODUCTS // 2)]))
            gc.collect()
            linux = reset_peak()
            before = resident("VmRSS") if linux else peak_so_far()
            began = time.perf_counter()
            result = work()
            solves.append(time.perf_counter() - began)
            if turn == 0:
                peak = (resident("VmHWM") if linux else peak_so_far()) - before
        return {"seconds": solves, "products": products, "added": peak, "x": result.x, "columns": result.columns}


def solve(qp: Any, problem: Problem) -> Any:
    """``QP.solve`` with the vectors of a problem."""
    q, total, lower, upper = problem[1:]
    return qp.solve(q, total=total, lower=lower, upper=upper, tol=TOL)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def read(path: str) -> Problem:
    """A problem that was written with :func:`write`."""
    return pickle.loads(Path(path).read_bytes())


def write(problem: Problem, path: Path) -> str:
    """Keep a problem in a file, so that every process reads the same bits; returns the path."""
    path.write_bytes(pickle.dumps(problem, protocol=5))
    return str(path)


def serve(solver: str, pipe: Connection) -> None:
    """Answer requests until the pipe is closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some libraries print
    warnings.simplefilter("ignore")
    server = Server(solver)
    while True:
        try:
            action, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = getattr(server, action)(**arguments)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        pipe.send(answer)


# -- the other end ------------------------------------------------------------------------------


class Worker:
    """A process of a solver, started when it is needed and again after it was ended."""

    def __init__(self, solver: str):
        self.solver = solver
        self.process: Any = None
        self.pipe: Any = None

    def ask(self, action: str, limit: float, **arguments: Any) -> Answer:
        """The answer to a request, {"over": True} if it takes longer than ``limit`` seconds, {"error": ...}."""
        if self.process is None:
            self._start()
        try:
            self.pipe.send((action, arguments))
            if not self.pipe.poll(limit):
                self.close()
                return {"over": True}
            return self.pipe.recv()
        except (EOFError, OSError):
            self.close()
            return {"error": "the process ended"}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(self.solver, other), daemon=True)
        with environment(surroundings()):
            self.process.start()
        other.close()

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


@contextlib.contextmanager
def environment(wanted: dict[str, str]) -> Iterator[None]:
    """Environment variables as a new process shall find them."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
