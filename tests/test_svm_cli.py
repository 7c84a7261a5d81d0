# SPDX-License-Identifier: BSD-3-Clause
"""`bcd svm`: what it prints, writes and returns, beside LIBSVM's own numbers."""

import bz2
import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn import svm as peer
from sklearn.datasets import load_iris
from typer.testing import CliRunner

from bcd import cli, libsvm, svm, svm_cli
from bcd.result import Status

run = CliRunner()
X, SPECIES = load_iris(return_X_y=True)
Y = np.array([7, -2, 3])[SPECIES]
ONE = np.where(SPECIES == 1, 1, -1)  # two classes that overlap


def call(*words):
    return run.invoke(cli.app, ["svm", *map(str, words)])


@pytest.fixture
def data(tmp_path):
    """Write svmlight data and return its path."""

    def write(rows=X[:, :3], y=ONE, name="d.svm"):
        libsvm.write_data(rows, y, tmp_path / name)
        return tmp_path / name

    return write


def printed(text, name):
    return float(text.split(f"{name} = ")[1].split()[0].rstrip(",%"))


def test_train_prints_libsvms_numbers_and_the_certificate(data, tmp_path):
    file, model = data(), tmp_path / "m.model"
    done = call("train", file, "-c", 2, "-g", 0.5, "--model", model)
    assert done.exit_code == 0, done.output
    theirs = peer.SVC(C=2, gamma=0.5).fit(X[:, :3], SPECIES == 1)
    alpha = np.abs(theirs.dual_coef_[0])
    K = np.exp(-0.5 * ((theirs.support_vectors_[:, None] - theirs.support_vectors_) ** 2).sum(axis=2))
    objective = 0.5 * theirs.dual_coef_[0] @ K @ theirs.dual_coef_[0] - alpha.sum()
    assert printed(done.output, "obj") == pytest.approx(objective, rel=1e-5)
    assert printed(done.output, "rho") == pytest.approx(-theirs.intercept_[0], abs=2e-3)
    assert printed(done.output, "Total nSV") == pytest.approx(len(alpha), abs=2)
    assert printed(done.output, "nBSV") == pytest.approx((alpha == 2).sum(), abs=2)
    assert printed(done.output, "violation") <= 1e-3
    assert 0 <= printed(done.output, "gap") < 0.1
    assert "Converged" in done.output
    assert np.mean(libsvm.load_model(model).predict(X[:, :3]) == theirs.predict(X[:, :3]) * 2 - 1) > 0.98


@pytest.mark.parametrize("options", [
    ["-s", "0", "-t", "2", "-c", "10", "-g", "0.5"],
    ["-s", "c_svc", "-t", "rbf", "-C", "10", "--gamma", "0.5"],
    ["-t", "1", "-d", "2", "-r", "-1", "-g", "1"],
    ["-s", "1", "-n", "0.3", "-m", "10", "-e", "0.0001"],
    ["-t", "0", "-h", "0", "-w1", "2", "-w-1", "0.5"],
])  # fmt: skip
def test_libsvms_options_mean_what_they_mean_there(data, tmp_path, monkeypatch, options):
    reference = pytest.importorskip("libsvm.svmutil", reason="libsvm-official is not installed (the dev extra has it)")
    monkeypatch.chdir(tmp_path)
    file = data()
    done = call("train", *options, file)
    assert done.exit_code == 0, done.output
    numbers = {"c_svc": "0", "rbf": "2"}
    theirs = [{"-C": "-c", "--gamma": "-g"}.get(word, numbers.get(word, word)) for word in options]
    y, rows = reference.svm_read_problem(str(file))
    model = reference.svm_train(y, rows, [*theirs, "-q"])
    labels, _, values = reference.svm_predict(y, rows, model, "-q")
    mine = libsvm.load_model(tmp_path / "d.svm.model")  # where LIBSVM writes it when it is not told
    decision = mine.decision_function(X[:, :3])
    sign = 1 if model.get_labels()[0] == 1 else -1
    np.testing.assert_allclose(sign * decision, np.ravel(values), atol=0.02 * np.abs(values).max())
    assert np.mean(mine.predict(X[:, :3]) == labels) > 0.98


def test_options_before_the_data_and_a_model_file_after_it(data, tmp_path):
    done = call("train", "-q", "-c", 10, data(), tmp_path / "second.model")
    assert done.exit_code == 0
    assert done.output == ""
    assert libsvm.read_model(tmp_path / "second.model").svm_type == "c_svc"


def test_every_type_trains_and_predicts(data, tmp_path):
    pairs = svm.SVC(C=10, gamma=1 / 3).fit(X[:, :3], Y)
    done = call("train", data(y=Y), "-c", 10, "--model", tmp_path / "m", "--json")
    report = json.loads(done.output)
    assert [pair["labels"] for pair in report["pairs"]] == [[-2, 3], [-2, 7], [3, 7]]
    assert report["objective"] == pytest.approx(pairs.dual_objective_.sum())
    assert report["n_bounded"] <= sum(pair["n_sv"] for pair in report["pairs"])
    done = call("predict", data(y=Y), tmp_path / "m", tmp_path / "out")
    assert printed(done.output, "Accuracy") == pytest.approx(100 * pairs.score(X[:, :3], Y), abs=1e-3)
    assert "(classification)" in done.output
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "out"), pairs.predict(X[:, :3]))

    for kind in ("epsilon_svr", "nu_svr"):
        file = data(rows=X[:, 1:], y=X[:, 0])
        assert call("train", "-s", kind, file, tmp_path / "m").exit_code == 0
        done = call("predict", file, tmp_path / "m")
        predicted = libsvm.load_model(tmp_path / "m").predict(X[:, 1:])
        assert printed(done.output, "Mean squared error") == pytest.approx(
            np.mean((predicted - X[:, 0]) ** 2), rel=1e-5
        )
        squared = np.corrcoef(predicted, X[:, 0])[0, 1] ** 2
        assert printed(done.output, "Squared correlation coefficient") == pytest.approx(squared, rel=1e-5)

    assert call("train", "-s", "2", "-n", "0.2", data(), tmp_path / "m").exit_code == 0
    done = call("predict", data(), tmp_path / "m", "--json")
    assert set(json.loads(done.output)["predictions"]) == {-1, 1}


def test_nu_svc_prints_libsvms_objective(data, tmp_path):
    """LIBSVM divides the solution by rho and the objective by its square."""
    done = call("train", "-s", 1, "-n", 0.3, "-e", 1e-5, data(), tmp_path / "m")
    model = libsvm.read_model(tmp_path / "m")
    Z, b = model.vectors.toarray(), model.coef[0]
    K = np.exp(-((Z[:, None] - Z) ** 2).sum(axis=2) / 3)
    assert printed(done.output, "obj") == pytest.approx(0.5 * b @ K @ b, rel=1e-5)
    assert printed(done.output, "nBSV") == np.isclose(np.abs(b), np.abs(b).max(), rtol=1e-9).sum()


def test_precomputed_kernels(data, tmp_path):
    K = np.exp(-((X[:, None] - X) ** 2).sum(axis=2))
    rows = np.column_stack([np.arange(1, 151), K])
    libsvm_text = "\n".join(
        f"{y} " + " ".join(f"{j}:{v!r}" for j, v in enumerate(row))
        for y, row in zip(Y.tolist(), rows.tolist(), strict=True)
    )
    file = tmp_path / "k.svm"
    file.write_text(libsvm_text + "\n")
    assert call("train", "-t", 4, file, tmp_path / "m").exit_code == 0
    done = call("predict", file, tmp_path / "m")
    assert printed(done.output, "Accuracy") == pytest.approx(100 * svm.SVC(gamma=1).fit(X, Y).score(X, Y), abs=1)
    file.write_text("1 0:2 1:1 2:0\n-1 0:1 1:0 2:1\n")
    done = call("train", "-t", "precomputed", file, tmp_path / "m")
    assert done.exit_code == 2
    assert "0:1, 0:2, ..., 0:n before them" in done.stderr


def test_compressed_and_narrow_or_wide_data(data, tmp_path):
    packed = tmp_path / "d.svm.bz2"
    packed.write_bytes(bz2.compress(data().read_bytes()))
    assert call("train", packed, "--float32", "--model", tmp_path / "m").exit_code == 0
    for columns in (2, 5):
        rows = np.hstack([X, X])[:, :columns]
        done = call("predict", data(rows=rows), tmp_path / "m", tmp_path / "out")
        assert done.exit_code == 0, done.output
        wide = np.hstack([rows, np.zeros((150, max(0, 3 - columns)))])
        expected = libsvm.load_model(tmp_path / "m", n_features=wide.shape[1]).predict(wide)
        np.testing.assert_array_equal(np.loadtxt(tmp_path / "out"), expected)


def test_cross_validation_writes_no_model(data, tmp_path):
    model = tmp_path / "m"
    done = call("train", data(y=Y), "-v", 5, model)
    assert done.exit_code == 0
    assert 90 < printed(done.output, "Cross Validation Accuracy") <= 100
    assert not model.exists()
    done = call("train", "-s", 3, data(rows=X[:, 1:], y=X[:, 0]), "-v", 5, model)
    assert 0 < printed(done.output, "Cross Validation Mean squared error") < 0.3
    assert 0.7 < printed(done.output, "Cross Validation Squared correlation coefficient") < 1


def test_a_path_gives_what_single_fits_give(data, tmp_path):
    out = tmp_path / "path"
    options = ["--gamma", 0.5, "--C-min", 0.1, "--C-max", 100, "--num", 4, "--folds", 3, "-e", 1e-5]
    done = call("path", data(y=Y), *options, "--out", out)
    assert done.exit_code == 0, done.output
    assert "Best accuracy in 3-fold cross-validation" in done.output
    report = json.loads((out / "path.json").read_text())
    assert [row["C"] for row in report["path"]] == pytest.approx([0.1, 1, 10, 100])
    for row in report["path"]:
        alone = svm.SVC(C=row["C"], gamma=0.5, tol=1e-5).fit(X[:, :3], Y)
        assert row["objective"] == pytest.approx(alone.dual_objective_.sum(), rel=1e-6)
        assert row["primal_objective"] + row["objective"] == pytest.approx(row["gap"], abs=1e-9)
        assert 0.9 < row["score"] < 1
        assert row["status"] == "converged"
    assert (out / "path.png").read_bytes().startswith(b"\x89PNG")


def test_a_path_of_regressions_without_folds(data, tmp_path):
    file = data(rows=X[:, 1:], y=X[:, 0])
    done = call("path", file, "-s", "epsilon_svr", "--num", 3, "--folds", 0, "--json", "--out", tmp_path)
    report = json.loads(done.output)
    assert report["score"] == "mean squared error"
    assert [row["score"] for row in report["path"]] == [None] * 3
    assert (tmp_path / "path.png").exists()


@pytest.mark.parametrize("ending", [Status.TIME_LIMIT, Status.INTERRUPTED])
def test_a_path_that_ends_early_keeps_its_rows(data, tmp_path, monkeypatch, ending):
    fits, fit = [], svm.SVC.fit

    def limited(machine, *arguments):
        fits.append(machine.C)
        fit(machine, *arguments)
        if machine.C > 1:
            machine.status_ = ending
        return machine

    monkeypatch.setattr(svm.SVC, "fit", limited)
    options = ["--C-min", 0.1, "--C-max", 10, "--num", 3, "--folds", 2, "--json"]
    done = call("path", data(), *options)
    assert done.exit_code == {Status.TIME_LIMIT: 3, Status.INTERRUPTED: 130}[ending]
    report = json.loads(done.output)
    assert [row["status"] for row in report["path"]] == ["converged", "converged", ending.name.lower()]
    assert [row["score"] is None for row in report["path"]] == [False, False, True]
    assert fits == [pytest.approx(C) for C in [0.1] * 3 + [1] * 3 + [10]]


def test_a_time_limit_saves_the_model_and_returns_three(data, tmp_path):
    done = call("train", data(), "-e", 1e-9, "--time-limit", 0, "--model", tmp_path / "m")
    assert done.exit_code == 3, done.output
    assert "Stopped at --time-limit" in done.output
    assert printed(done.output, "gap") > 0
    libsvm.load_model(tmp_path / "m")


INTERRUPTED = """
import os, signal, sys
from bcd import cli, svm
real = svm.solve_dual
def solve(*args, **options):
    def look(progress):
        if progress.iteration >= 100:
            os.kill(os.getpid(), signal.SIGINT)
    return real(*args, **{**options, "callback": look})
svm.solve_dual = solve
cli.app(sys.argv[1:])
"""


def test_ctrl_c_saves_the_best_model(data, tmp_path):
    """SIGINT while the solver works, in a process of its own."""
    rng = np.random.default_rng(0)
    file = data(rows=rng.standard_normal((600, 5)), y=rng.choice([-1, 1], 600))
    words = ["svm", "train", str(file), "-c", "1000", "-g", "0.5", "-e", "1e-9", "--model", str(tmp_path / "m")]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 130, done.stdout + done.stderr
    assert "Interrupted; the model is the best so far" in done.stdout
    assert printed(done.stdout, "gap") > 0
    assert "Traceback" not in done.stderr
    assert libsvm.load_model(tmp_path / "m").n_features_in_ == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-s", "5"], "svm type (-s) must be one of 0 = c_svc"),
        (["-t", "laplacian"], "kernel (-t) must be one of 0 = linear"),
        (["-g", "x"], "gamma must be a number >= 0, auto or scale; got 'x'"),
        (["-h", "2"], "-h must be 0 or 1; got 2"),
        (["-b", "1"], "CalibratedClassifierCV"),
        (["-w1", "x"], "a weight is -wLABEL W"),
        (["-w9", "2"], "a weight is given for the label 9"),
        (["-s", "3", "-w1", "2"], "class weights are for c_svc and nu_svc"),
        (["-c", "-1"], "'C' parameter of SVC must be a float in the range"),
        (["-s", "1", "-n", "0.9"], "nu is infeasible"),
        (["-v", "1"], "-v needs from 2 folds"),
        (["--model", "nowhere/m"], "must be a file in a folder that exists"),
        (["other", "--model", "m"], "the model file is named twice"),
    ],
)
def test_wrong_options_are_one_sentence_and_exit_code_two(data, words, message):
    done = call("train", data(), *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_files_are_one_sentence_and_exit_code_two(data, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("1 1:1\n-1 2;1\n")
    for words, message in [
        (["train", broken], "broken, line 2: found '2;1'; needs index:value"),
        (["train", tmp_path / "missing"], "missing: no such file"),
        (["train", data(), data()], "is read and would be overwritten"),
        (["predict", data(), broken, broken], "is read and would be overwritten"),
        (["train", data(y=X[:, 0], name="reals")], "classes must be integers; found"),
        (["train", data(y=np.ones(150), name="ones")], "at least two classes"),
        (["predict", data(), tmp_path / "missing"], "missing: no such file"),
        (["predict", data(), broken], "broken, line 1: found '1'; needs a field"),
        (["path", data(), "-s", "one_class"], "a path needs an svm type with C"),
        (["path", data(), "--C-min", 3, "--C-max", 2], "--C-min and --C-max must be positive numbers"),
        (["path", data(), "--num", 0], "--num must be at least 1"),
    ]:
        done = call(*words)
        assert done.exit_code == 2, words
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_file_with_probabilities_predicts_with_a_warning(data, tmp_path):
    call("train", data(), tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes().replace(b"nr_sv", b"probA 1\nnr_sv"))
    done = call("predict", data(), tmp_path / "m")
    assert done.exit_code == 0
    assert done.stderr.startswith("bcd: warning:")
    assert "probA ignored" in done.stderr


def test_the_picture_marks_what_is_not_finished():
    row = {"C": 1.0, "objective": -2.0, "primal_objective": 2.1, "gap": 0.1, "n_sv": 3, "n_bounded": 1,
           "status": "converged", "score": 0.9, "score_error": 0.01}  # fmt: skip
    rows = [row, row | {"C": 10.0, "status": "time_limit", "score": None, "gap": np.inf}]
    report = {"data": "d", "svm_type": "c_svc", "kernel": "rbf", "folds": 5, "score": "accuracy", "path": rows}
    figure = svm_cli.plot_path(report)
    assert len(figure.axes) == 4
    assert any(line.get_markerfacecolor() == "white" for line in figure.axes[0].lines)
    assert [len(line.get_xdata()) for line in figure.axes[1].lines] == [1, 1]
