# SPDX-License-Identifier: BSD-3-Clause
"""``bcd svm``: train, predict and follow a path of C, with LIBSVM's options and files.

Exit codes as of :mod:`bcd.cli`. A run that stops early (time limit, iteration limit, Ctrl-C) saves the best model so
far and says how far from optimal it is proven to be at most.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from bcd.result import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer(
    help="Support vector machines: LIBSVM's options and files, with a certificate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
SVM_TYPES = ("c_svc", "nu_svc", "one_class", "epsilon_svr", "nu_svr")  # the order of LIBSVM's -s
SHORT = {"accuracy": "accuracy", "mean squared error": "MSE"}
KERNELS = ("linear", "poly", "rbf", "sigmoid", "precomputed")  # the order of LIBSVM's -t


class LibsvmCommand(TyperCommand):
    """A command that also takes LIBSVM's ``-wLABEL WEIGHT``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, once every ``-w1 2`` is ``--weight 1=2``."""
        plain: list[str] = []
        for i, arg in enumerate(args):
            if i and re.fullmatch(r"-w[+-]?[0-9]+", args[i - 1]):
                plain[-1] = f"{plain[-1]}={arg}"
            elif re.fullmatch(r"-w[+-]?[0-9]+", arg):
                plain += ["--weight", arg[2:]]
            else:
                plain.append(arg)
        return super().parse_args(ctx, plain)


# Options that the commands share
Data = Annotated[Path, typer.Argument(help="svmlight file (label index:value ...), .gz and .bz2 too.")]
SvmType = Annotated[str, typer.Option("-s", "--svm-type", help="0-4 or c_svc, nu_svc, one_class, epsilon_svr, nu_svr.")]
KernelName = Annotated[str, typer.Option("-t", "--kernel", help="0-4 or linear, poly, rbf, sigmoid, precomputed.")]
Degree = Annotated[int, typer.Option("-d", "--degree", help="Of the polynomial kernel.")]
Gamma = Annotated[str, typer.Option("-g", "--gamma", help="A number, auto (1 / features, LIBSVM's) or scale.")]
Coef0 = Annotated[float, typer.Option("-r", "--coef0", help="Of the polynomial and sigmoid kernels.")]
Epsilon = Annotated[float, typer.Option("-p", "--epsilon", help="Width of the tube of epsilon_svr.")]
Cache = Annotated[float, typer.Option("-m", "--cache-size", help="Memory for kernel columns in MB.")]
Tol = Annotated[float, typer.Option("-e", "--tol", help="Violation to reach.")]
Shrinking = Annotated[int, typer.Option("-h", "--shrinking", help="0 or 1.")]
Weight = Annotated[list[str] | None, typer.Option("--weight", metavar="LABEL=W", help="As -wLABEL W: C times W.")]
TimeLimit = Annotated[float | None, typer.Option("--time-limit", help="Seconds at most.")]
Single = Annotated[bool, typer.Option("--float32", help="Read the data in single precision.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the folds.")]


@app.command(cls=LibsvmCommand, no_args_is_help=True)
def train(
    data: Data,
    model_file: Annotated[Path | None, typer.Argument(help="As --model.", show_default=False)] = None,
    svm_type: SvmType = "c_svc",
    kernel: KernelName = "rbf",
    C: Annotated[float, typer.Option("-c", "-C", "--cost", help="Price of an error (c_svc, both SVRs).")] = 1.0,
    gamma: Gamma = "auto",
    degree: Degree = 3,
    coef0: Coef0 = 0.0,
    nu: Annotated[float, typer.Option("-n", "--nu", help="Of nu_svc, nu_svr and one_class.")] = 0.5,
    epsilon: Epsilon = 0.1,
    cache_size: Cache = 200.0,
    tol: Tol = 1e-3,
    shrinking: Shrinking = 1,
    weight: Weight = None,
    probability: Annotated[int, typer.Option("-b", help="0; for 1 see docs/svm.md.", hidden=True)] = 0,
    folds: Annotated[int, typer.Option("-v", "--folds", help="Cross-validate instead; no model is written.")] = 0,
    model: Annotated[Path | None, typer.Option(help="Where to write it; default: the data's name + .model.")] = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    float32: Single = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a machine and write it as a LIBSVM model file."""
    from bcd import cli

    with cli._errors():
        if probability:
            raise ValueError("-b 1 is not supported; calibrate in Python with CalibratedClassifierCV (docs/svm.md)")
        if model is not None and model_file is not None:
            raise ValueError(f"the model file is named twice: {model_file} and --model {model}")
        target = model or model_file or Path(data.name + ".model")
        cli._check_targets(target, sources=(data,))
        machine = _machine(svm_type, kernel, weight, **{
            "C": C, "gamma": gamma, "degree": degree, "coef0": coef0, "nu": nu, "epsilon": epsilon, "tol": tol,
            "cache_size": cache_size, "shrinking": _flag("-h", shrinking), "time_limit": time_limit,
        })  # fmt: skip
        X, y = _load(data, machine, float32)
        report = _cross_validate(machine, X, y, folds, seed) if folds else _train(machine, X, y, target)
    if as_json:
        print(json.dumps(cli._json_safe(report)))
    elif not quiet:
        print("\n".join(_train_lines(report)))
    raise typer.Exit(_exit_code(report.get("status", "converged")))


@app.command(no_args_is_help=True)
def predict(
    data: Data,
    model_file: Annotated[Path, typer.Argument(metavar="MODEL", help="LIBSVM model file.")],
    out: Annotated[Path | None, typer.Argument(help="Where to write the predictions, one a line.")] = None,
    probability: Annotated[int, typer.Option("-b", hidden=True)] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Predict with a model file, LIBSVM's or ours."""
    from bcd import cli, libsvm

    with cli._errors(), _warnings():
        if probability:
            raise ValueError("-b 1 is not supported; calibrate in Python with CalibratedClassifierCV (docs/svm.md)")
        cli._check_targets(out, sources=(data, model_file))
        if not model_file.is_file():
            raise ValueError(f"{model_file}: {'is a folder; needs a file' if model_file.is_dir() else 'no such file'}")
        model = libsvm.read_model(model_file)
        X, y = libsvm.read_data(data, n_features=model.vectors.shape[1], precomputed=model.kernel == "precomputed")
        X = X[:, 1:] if model.kernel == "precomputed" else X
        estimator = libsvm._loaded(model, model_file, X.shape[1])
        predicted = estimator.predict(_fitting(X, estimator))
        report = _scores(libsvm._svm_type(estimator), y, predicted)
        if out is not None:
            _write_lines(out, predicted)
    if as_json:
        print(json.dumps(cli._json_safe(report | {"predictions": predicted.tolist()})))
    elif not quiet:
        print("\n".join(_score_lines(report)))


@app.command(no_args_is_help=True)
def path(
    data: Data,
    svm_type: SvmType = "c_svc",
    kernel: KernelName = "rbf",
    gamma: Gamma = "auto",
    degree: Degree = 3,
    coef0: Coef0 = 0.0,
    epsilon: Epsilon = 0.1,
    C_min: Annotated[float, typer.Option("--C-min", help="First C.")] = 2.0**-5,
    C_max: Annotated[float, typer.Option("--C-max", help="Last C.")] = 2.0**10,
    num: Annotated[int, typer.Option(help="How many, evenly spaced in log C.")] = 16,
    folds: Annotated[int, typer.Option("-v", "--folds", help="Of the cross-validation; 0: none.")] = 5,
    cache_size: Cache = 200.0,
    tol: Tol = 1e-3,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    float32: Single = False,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="Folder for path.json and path.png.")] = None,
) -> None:
    """Follow the solution from a small C to a large one, each started from the last."""
    from bcd import cli, libsvm

    with cli._errors():
        Cs = _grid(C_min, C_max, num)
        machine = _machine(svm_type, kernel, None, **{
            "gamma": gamma, "degree": degree, "coef0": coef0, "epsilon": epsilon, "tol": tol,
            "cache_size": cache_size, "warm_start": True,
        })  # fmt: skip
        if "C" not in machine.get_params():
            raise ValueError(f"a path needs an svm type with C (c_svc, epsilon_svr, nu_svr); got {svm_type}")
        X, y = _load(data, machine, float32)
        if out is not None:
            cli._check_folder(out)
        rows, ended = _follow(machine, X, y, Cs, folds, seed, time_limit)
        report = {
            "data": data.name, "svm_type": libsvm._svm_type(machine), "kernel": machine.kernel, "tol": tol,
            "folds": folds, "score": "accuracy" if hasattr(machine, "classes_") else "mean squared error",
            "status": ended, "path": rows,
        }  # fmt: skip
        if out is not None:
            (out / "path.json").write_text(json.dumps(cli._json_safe(report), indent=1), encoding="utf-8")
            if rows:
                plot_path(report, out / "path.png")
    if as_json:
        print(json.dumps(cli._json_safe(report)))
    else:
        _print_path(report)
    raise typer.Exit(_exit_code(ended))


# What the options mean --------------------------------------------------------------------------------------------


def _flag(name: str, value: int) -> bool:
    if value not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1; got {value}")
    return bool(value)


def _choice(what: str, text: str, names: tuple[str, ...]) -> str:
    """A name, LIBSVM's number of it, or LIBSVM's longer name of poly."""
    text = {"polynomial": "poly"}.get(text, text)
    if text in map(str, range(len(names))):
        return names[int(text)]
    if text not in names:
        numbered = ", ".join(f"{i} = {name}" for i, name in enumerate(names))
        raise ValueError(f"{what} must be one of {numbered}; got {text!r}")
    return text


def _gamma(text: str) -> str | float:
    """A number, auto or scale; 0 is auto, as in LIBSVM."""
    if text in ("auto", "scale"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < np.inf:
        raise ValueError(f"gamma must be a number >= 0, auto or scale; got {text!r}")
    return value or "auto"


def _weights(given: list[str] | None) -> dict[int, float] | None:
    """Class weights from LABEL=W."""
    if not given:
        return None
    weights = {}
    for text in given:
        label, _, weight = text.partition("=")
        try:
            weights[int(label)] = float(weight)
        except ValueError:
            raise ValueError(f"a weight is -wLABEL W, an integer and a number >= 0; got -w{label} {weight}") from None
        if not 0 <= weights[int(label)] < np.inf:
            raise ValueError(f"weights must be numbers >= 0; got {weight} for label {label}")
    return weights


def _machine(svm_type: str, kernel: str, weight: list[str] | None, **values: Any) -> Any:
    """The estimator, not yet fitted; values that it has no use for are left out, as LIBSVM does."""
    from bcd import libsvm, svm

    svm_type = _choice("svm type (-s)", svm_type, SVM_TYPES)
    values["kernel"] = _choice("kernel (-t)", kernel, KERNELS)
    values["gamma"] = _gamma(values["gamma"])
    values["class_weight"] = _weights(weight)
    if values["class_weight"] and svm_type not in libsvm.CLASSIFIERS:
        raise ValueError(f"class weights are for c_svc and nu_svc; got them with {svm_type}")
    machine = getattr(svm, libsvm.TYPES[svm_type])()
    known = machine.get_params()
    return machine.set_params(**{name: value for name, value in values.items() if name in known})


def _load(data: Path, machine: Any, float32: bool) -> tuple[Any, np.ndarray]:
    """Training data: features or the kernel matrix, and integer labels for a classifier."""
    from bcd import libsvm

    precomputed = machine.kernel == "precomputed"
    X, y = libsvm.read_data(data, precomputed=precomputed, dtype=np.float32 if float32 else np.float64)
    if precomputed:
        rows, X = X[:, 0], X[:, 1:]
        if X.shape[0] != X.shape[1] or not np.array_equal(rows, np.arange(1, len(rows) + 1)):
            needs = "n kernel values on each of n lines, and 0:1, 0:2, ..., 0:n before them"
            raise ValueError(f"{data}: training on a precomputed kernel needs {needs}; found shape {X.shape}")
    elif X.nnz > 0.5 * X.shape[0] * X.shape[1]:
        X = X.toarray()  # at most a third larger than CSR, and dense products are faster
    if libsvm._svm_type(machine) in libsvm.CLASSIFIERS:
        wrong = np.flatnonzero((y != np.round(y)) | (np.abs(y) > libsvm.LARGEST))
        if len(wrong):
            raise ValueError(f"{data}: classes must be integers; found {y[wrong[0]]:g} (regression: -s 3)")
        y = y.astype(np.int64)
        _check_weights(machine.class_weight, y)
    return X, y


def _check_weights(weights: dict[int, float] | None, y: np.ndarray) -> None:
    missing = sorted(set(weights or ()) - set(y.tolist()))
    if missing:
        raise ValueError(f"a weight is given for the label {missing[0]}, which the data do not have")


def _grid(low: float, high: float, num: int) -> list[float]:
    if not 0 < low <= high < np.inf:
        raise ValueError(
            f"--C-min and --C-max must be positive numbers, the first at most the second; got {low}, {high}"
        )
    if num < 1:
        raise ValueError(f"--num must be at least 1; got {num}")
    return [float(C) for C in np.geomspace(low, high, num)]


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Warnings as single lines; that a solver stopped early is said elsewhere."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(w.message) for w in caught if not issubclass(w.category, ConvergenceWarning)):
        typer.echo(f"bcd: warning: {text}", err=True)


# Training ---------------------------------------------------------------------------------------------------------


def _train(machine: Any, X: Any, y: np.ndarray, target: Path) -> dict[str, Any]:
    """Fit, save, report."""
    from bcd import libsvm

    start = time.perf_counter()
    with _warnings(), _progress(machine, "training"):
        machine.fit(X, y)
    seconds = time.perf_counter() - start
    libsvm.save_model(machine, target)
    pairs = _pairs(machine, y)
    return {
        "svm_type": libsvm._svm_type(machine),
        "kernel": machine.kernel,
        "gamma": float(machine._gamma),
        **_certificate(machine),
        "n_sv": len(machine.support_),
        "n_bounded": sum(pair["n_bounded"] for pair in pairs),
        "pairs": pairs,
        "seconds": seconds,
        "model": str(target),
    }


def _certificate(machine: Any) -> dict[str, Any]:
    """Of several pairs of classes: the largest violation, the sums of the others, and the worst status."""
    status = _worst(machine.status_ if isinstance(machine.status_, list) else [machine.status_])
    return {
        "objective": float(np.sum(machine.dual_objective_)),
        "primal_objective": float(np.sum(machine.primal_objective_)),
        "gap": float(np.sum(machine.duality_gap_)),
        "violation": float(np.max(machine.violation_)),
        "iterations": int(np.sum(machine.n_iter_)),
        "columns": int(np.sum(machine.n_columns_)),
        "status": status.name.lower(),
    }


def _worst(statuses: list[Status]) -> Status:
    """Interrupted before all else, then whatever is not converged."""
    return max(statuses, key=lambda status: (status is Status.INTERRUPTED, not status.ok))


def _pairs(machine: Any, y: np.ndarray) -> list[dict[str, Any]]:
    """What LIBSVM prints of every problem it solves: one, or one a pair of classes."""
    from bcd import libsvm

    classes = getattr(machine, "classes_", np.empty(0))
    if len(classes) <= 2:
        coef = machine.dual_coef_.toarray() if hasattr(machine.dual_coef_, "toarray") else machine.dual_coef_
        blocks = [(coef[0], np.repeat(np.arange(len(machine.n_support_)), machine.n_support_), (0, 1))]
    else:
        blocks = list(_pair_coefficients(machine, len(classes)))
    rho = libsvm._as_model(machine).rho
    objectives, iterations = np.ravel(machine.dual_objective_), np.ravel(machine.n_iter_)
    rows = []
    for p, (coef, owner, pair) in enumerate(blocks):
        bound, scale = _bound(machine, coef, owner, pair, y)
        size = np.abs(coef)
        rows.append({
            "labels": [int(label) for label in classes[list(pair)]] if len(classes) else None,
            "iterations": int(iterations[p]),
            "objective": float(objectives[p]) * scale,
            "rho": float(rho[p]),
            "n_sv": int(np.count_nonzero(size)),
            "n_bounded": int(np.count_nonzero(size >= bound * (1 - 1e-12))) if len(size) else 0,
        })  # fmt: skip
    return rows


def _pair_coefficients(machine: Any, k: int) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """Non-zero coefficients of every pair of classes, and the class of each."""
    table = machine.dual_coef_.toarray() if hasattr(machine.dual_coef_, "toarray") else machine.dual_coef_
    parts = np.split(np.arange(table.shape[1]), np.cumsum(machine.n_support_)[:-1])
    for i, j in combinations(range(k), 2):
        coef = np.concatenate([table[j - 1, parts[i]], table[i, parts[j]]])
        owner = np.repeat([i, j], [len(parts[i]), len(parts[j])])
        yield coef[coef != 0], owner[coef != 0], (i, j)


def _bound(machine: Any, coef: np.ndarray, owner: np.ndarray, pair: tuple[int, int], y: np.ndarray) -> Any:
    """The largest size a coefficient may have, and the factor of LIBSVM's objective (nu_svc divides by rho^2)."""
    from bcd import libsvm

    svm_type = libsvm._svm_type(machine)
    if svm_type == "one_class":
        return 1.0, 1.0
    if svm_type not in libsvm.CLASSIFIERS:
        return machine.C, 1.0
    weight = machine.class_weight_
    if svm_type == "c_svc":
        return machine.C * weight[owner], 1.0
    total = sum(weight[c] * np.count_nonzero(y == machine.classes_[c]) for c in pair)
    divisor = machine.nu * total / np.abs(coef).sum()  # the margin that nu_svc divides its solution by
    return weight[owner] / divisor, divisor**-2


def _train_lines(report: dict[str, Any]) -> list[str]:
    """LIBSVM's lines, then what is proven."""
    if "accuracy" in report or "mse" in report:
        return _score_lines(report)
    lines = []
    for pair in report["pairs"]:
        if len(report["pairs"]) > 1:
            lines.append(f"classes {pair['labels'][0]} and {pair['labels'][1]}")
        lines.append(f"optimization finished, #iter = {pair['iterations']}")
        lines.append(f"obj = {pair['objective']:.6f}, rho = {pair['rho']:.6f}")
        lines.append(f"nSV = {pair['n_sv']}, nBSV = {pair['n_bounded']}")
    several = len(report["pairs"]) > 1
    return [
        *lines,
        f"Total nSV = {report['n_sv']}",
        f"violation = {report['violation']:.3g}{' at most' if several else ''}, gap = {report['gap']:.3g}"
        f"{' over all pairs' if several else ''} (a bound on obj - optimum), "
        f"columns = {report['columns']}, seconds = {report['seconds']:.3g}",
        _sentence(report["status"]),
        f"Model: {report['model']}",
    ]


def _sentence(status: str) -> str:
    """What a status says, in the words of the command line."""
    return {
        "converged": "Converged: the tolerance is met.",
        "time_limit": "Stopped at --time-limit; the model is the best so far, and the gap says how good.",
        "interrupted": "Interrupted; the model is the best so far, and the gap says how good.",
    }.get(status, Status[status.upper()].value)


def _exit_code(status: str) -> int:
    from bcd import cli

    return cli.EXIT.get(Status[status.upper()], cli.STOPPED_EARLY)


@contextlib.contextmanager
def _progress(machine: Any, what: str) -> Iterator[None]:
    """A line that follows the fit, when somebody is looking: what ``verbose`` prints once a second."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(what) as line, contextlib.redirect_stdout(_Line(line, what)):
        machine.verbose = True
        try:
            yield
        finally:
            machine.verbose = False


class _Line:
    """A file whose writer moves the status line."""

    def __init__(self, line: Any, what: str):
        self.line, self.what = line, what

    def write(self, text: str) -> int:
        if text.strip():
            _, _, progress = text.strip().partition(": ")  # the machine's name is known
            self.line.update(f"{self.what}: {progress}"[: self.line.console.width - 4])
        return len(text)

    def flush(self) -> None:
        """Nothing is kept."""


# Scores -----------------------------------------------------------------------------------------------------------


def _cross_validate(machine: Any, X: Any, y: np.ndarray, folds: int, seed: int) -> dict[str, Any]:
    """LIBSVM's -v: the score of the predictions that every fold gets from the others."""
    from sklearn.base import clone

    from bcd import libsvm

    predicted = np.empty(len(y))
    statuses = []
    start = time.perf_counter()
    for k, (train_rows, test_rows) in enumerate(_folds(machine, y, folds, seed)):
        one = clone(machine)
        with _warnings(), _progress(one, f"fold {k + 1} of {folds}"):
            one.fit(_part(X, train_rows, train_rows, machine), y[train_rows])
        statuses += one.status_ if isinstance(one.status_, list) else [one.status_]
        if statuses[-1] is Status.INTERRUPTED:
            raise KeyboardInterrupt
        predicted[test_rows] = one.predict(_part(X, test_rows, train_rows, machine))
    report = _scores(libsvm._svm_type(machine), y, predicted)
    return report | {"folds": folds, "seconds": time.perf_counter() - start, "status": _worst(statuses).name.lower()}


def _folds(machine: Any, y: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows to train on, rows to test on); a classifier's folds keep the shares of the classes."""
    from sklearn.model_selection import KFold, StratifiedKFold

    from bcd import libsvm

    if not 2 <= folds <= len(y):
        raise ValueError(f"-v needs from 2 folds to one a row ({len(y)}); got {folds}")
    classifier = libsvm._svm_type(machine) in libsvm.CLASSIFIERS
    if classifier and np.unique(y, return_counts=True)[1].max() < folds:
        raise ValueError(f"-v {folds} needs a class of at least {folds} rows")
    split = (StratifiedKFold if classifier else KFold)(folds, shuffle=True, random_state=seed)
    with _warnings():
        return list(split.split(np.zeros(len(y)), y))


def _part(X: Any, rows: np.ndarray, columns: np.ndarray, machine: Any) -> Any:
    return X[np.ix_(rows, columns)] if machine.kernel == "precomputed" else X[rows]


def _scores(svm_type: str, y: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """What LIBSVM says of predictions."""
    if not svm_type.endswith("svr"):
        right = int(np.count_nonzero(y == predicted))
        return {"accuracy": right / len(y), "correct": right, "total": len(y)}
    spread = np.std(y) * np.std(predicted)
    correlation = np.mean((y - y.mean()) * (predicted - predicted.mean())) / spread if spread > 0 else np.nan
    return {"mse": float(np.mean((y - predicted) ** 2)), "squared_correlation": float(correlation**2), "total": len(y)}


def _score_lines(report: dict[str, Any]) -> list[str]:
    """LIBSVM's lines of a prediction or a cross-validation."""
    lead, tail = ("Cross Validation ", "") if "folds" in report else ("", " (regression)")
    if "accuracy" in report:
        tail = "" if "folds" in report else f" ({report['correct']}/{report['total']}) (classification)"
        lines = [f"{lead}Accuracy = {100 * report['accuracy']:.6g}%{tail}"]
    else:
        lines = [
            f"{lead}Mean squared error = {report['mse']:.6g}{tail}",
            f"{lead}Squared correlation coefficient = {report['squared_correlation']:.6g}{tail}",
        ]
    if report.get("status", "converged") != "converged":
        lines.append(f"Some folds did not converge: {_sentence(report['status'])}")
    return lines


def _fitting(X: Any, estimator: Any) -> Any:
    """The data in the form in which the model is."""
    from scipy import sparse

    if estimator.kernel == "precomputed":
        needed = int(estimator.support_.max(initial=-1)) + 1
        if X.shape[1] < needed:
            raise ValueError(f"the model needs {needed} kernel values on a line; found {X.shape[1]}")
        return X
    dense = not sparse.issparse(estimator.support_vectors_) and 2 * X.nnz > X.shape[0] * X.shape[1]
    return X.toarray() if dense else X


def _write_lines(file: Path, values: np.ndarray) -> None:
    with file.open("w", encoding="ascii") as handle:
        handle.writelines(f"{value!r}\n" for value in values.tolist())


# A path of C ------------------------------------------------------------------------------------------------------


def _follow(
    machine: Any, X: Any, y: np.ndarray, Cs: list[float], folds: int, seed: int, time_limit: float | None
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the table, and how it ended: every row is a C that was finished, the last one may be cut short."""
    from sklearn.base import clone

    ends = np.inf if time_limit is None else time.perf_counter() + time_limit
    parts = _folds(machine, y, folds, seed) if folds else []
    machines = [clone(machine) for _ in parts]
    rows: list[dict[str, Any]] = []
    ended = "converged"
    for k, C in enumerate(Cs):
        try:
            row = _fit_at(machine, C, X, y, ends, f"C = {C:.4g} ({k + 1} of {len(Cs)})")
            rows.append(row)
            if row["status"] not in ("time_limit", "interrupted"):
                scores = [
                    _fold_score(one, C, X, y, part, ends, f"C = {C:.4g}, fold {f + 1} of {folds}")
                    for f, (one, part) in enumerate(zip(machines, parts, strict=True))
                ]
                _add_score(row, scores)
        except (KeyboardInterrupt, _OutOfTimeError) as stop:
            ended = "interrupted" if isinstance(stop, KeyboardInterrupt) else "time_limit"
            break
        if row["status"] != "converged":
            ended = row["status"]
        if ended in ("time_limit", "interrupted"):
            break
    return rows, ended


class _OutOfTimeError(Exception):
    """The time limit of the path is over."""


def _fit_at(machine: Any, C: float, X: Any, y: np.ndarray, ends: float, what: str) -> dict[str, Any]:
    start = time.perf_counter()
    machine.set_params(C=C, time_limit=None if ends == np.inf else max(ends - start, 1e-3))
    with _warnings(), _progress(machine, what):
        machine.fit(X, y)
    seconds = time.perf_counter() - start
    bounded = sum(pair["n_bounded"] for pair in _pairs(machine, y))
    row = {"C": C, **_certificate(machine), "n_sv": len(machine.support_), "n_bounded": bounded, "seconds": seconds}
    return row | {"score": None, "score_error": None}


def _fold_score(machine: Any, C: float, X: Any, y: np.ndarray, part: Any, ends: float, what: str) -> float:
    """Accuracy, or the mean squared error, on the rows that a fold leaves out."""
    train_rows, test_rows = part
    row = _fit_at(machine, C, _part(X, train_rows, train_rows, machine), y[train_rows], ends, what)
    if row["status"] == "interrupted":
        raise KeyboardInterrupt
    if row["status"] == "time_limit":
        raise _OutOfTimeError
    predicted = machine.predict(_part(X, test_rows, train_rows, machine))
    if hasattr(machine, "classes_"):
        return float(np.mean(predicted == y[test_rows]))
    return float(np.mean((predicted - y[test_rows]) ** 2))


def _add_score(row: dict[str, Any], scores: list[float]) -> None:
    if scores:
        row["score"] = float(np.mean(scores))
        row["score_error"] = float(np.std(scores, ddof=1) / np.sqrt(len(scores)))


def _best(scores: Any, name: str) -> int:
    """The first of the best: the smallest C of them."""
    return int(np.argmin(scores) if name.startswith("mean") else np.argmax(scores))


def _print_path(report: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    columns = ["C", "objective", "gap", "violation", "SVs", "at bound", "columns", "s", SHORT[report["score"]]]
    for name in columns if report["folds"] else columns[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["path"]:
        cells = [
            f"{row['C']:.4g}{'' if row['status'] == 'converged' else ' *'}", f"{row['objective']:.6g}",
            f"{row['gap']:.1e}", f"{row['violation']:.1e}", f"{row['n_sv']:,}", f"{row['n_bounded']:,}",
            f"{row['columns']:,}", f"{row['seconds']:.2g}",
        ]  # fmt: skip
        if report["folds"]:
            cells.append("" if row["score"] is None else f"{row['score']:.4f} ± {row['score_error']:.4f}")
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if any(row["status"] != "converged" for row in report["path"]):
        print("* stopped before the tolerance")
    scored = [row for row in report["path"] if row["score"] is not None]
    if scored:
        best = scored[_best([row["score"] for row in scored], report["score"])]
        folds = f"{report['folds']}-fold cross-validation"
        print(f"Best {report['score']} in {folds}: {best['score']:.4f} at C = {best['C']:.6g}")
    if report["status"] in ("interrupted", "time_limit"):
        print(
            "Interrupted; the rows so far are kept."
            if report["status"] == "interrupted"
            else "Stopped at --time-limit."
        )


def plot_path(report: dict[str, Any], file: Path | None = None) -> Figure:
    """Draw objective, gap, support vectors and the cross-validated score against C.

    Parameters
    ----------
    report : dict
        As ``bcd svm path --json`` prints it.
    file : path, optional
        Where to save the picture.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report["path"]
    scored = [row for row in rows if row["score"] is not None]
    figure = Figure(figsize=(10.4, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True).ravel()
    rows = [row | {"dual": -row["objective"], "share": row["gap"] / abs(row["objective"] or np.nan)} for row in rows]
    _draw(panels[0], rows, ["primal_objective", "dual"], ["primal", "dual, a lower bound of it"], "objective", log=True)
    _draw(panels[1], rows, ["gap", "share"], ["duality gap", "gap / objective"], "gap", log=True)
    _draw(panels[2], rows, ["n_sv", "n_bounded"], ["support vectors", "of these at the bound"], "support vectors")
    _draw(panels[3], scored, ["score"], [f"{report['folds']}-fold cross-validation"], report["score"])
    _draw_best(panels[3], scored, report["score"])
    panels[2].set_ylim(bottom=0)
    for axes in panels:
        axes.set_xscale("log")
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[2:]:
        axes.set_xlabel("C")
    figure.suptitle(f"{report['data']}: {report['svm_type']}, {report['kernel']} kernel", fontsize=11)
    if file is not None:
        figure.savefig(file, dpi=144)
    return figure


def _draw(
    axes: Any, rows: list[dict[str, Any]], keys: list[str], names: list[str], label: str, log: bool = False
) -> None:
    """One panel: a line with markers for each key; open markers where the solver stopped early."""
    from bcd.pictures import COLOURS, DASHES

    for k, (key, name) in enumerate(zip(keys, names, strict=True)):
        shown = [row for row in rows if np.isfinite(row[key]) and (row[key] > 0 or not log)]
        x, y = [row["C"] for row in shown], [row[key] for row in shown]
        style = {"color": COLOURS[k], "linestyle": DASHES[k], "linewidth": 1.6}
        axes.plot(x, y, label=name, marker="o", markersize=3.5, **style)
        early = [(row["C"], row[key]) for row in shown if row["status"] != "converged"]
        if early:
            axes.plot(*zip(*early, strict=True), "o", color=COLOURS[k], markerfacecolor="white", markersize=6)
    if log and axes.lines and any(len(line.get_xdata()) for line in axes.lines):
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9)


def _draw_best(axes: Any, rows: list[dict[str, Any]], score: str) -> None:
    """The band of one standard error, and a line at the best C."""
    from bcd.pictures import COLOURS

    if not rows:
        axes.text(0.5, 0.5, "no cross-validation", ha="center", va="center", transform=axes.transAxes, color="#777777")
        return
    C, mean, error = (np.array([row[key] for row in rows]) for key in ("C", "score", "score_error"))
    axes.fill_between(
        C, mean - error, mean + error, color=COLOURS[0], alpha=0.15, linewidth=0, label="one standard error"
    )
    best = C[_best(mean, score)]
    axes.axvline(best, color=COLOURS[6], linewidth=0.8)
    axes.annotate(f"best: C = {best:.4g}", (best, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0),
                  textcoords="offset points", fontsize=9, color="#555555")  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
