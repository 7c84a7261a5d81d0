# SPDX-License-Identifier: BSD-3-Clause
"""LIBSVM's files: what is written predicts alike in LIBSVM, what LIBSVM wrote predicts alike here, junk is refused."""

import bz2
import gzip
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from sklearn import svm as peer
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.metrics.pairwise import rbf_kernel

from bcd import libsvm, svm

LABELS = np.array([7, -2, 3])  # in the order in which iris has its classes: neither sorted nor reversed
X, SPECIES = load_iris(return_X_y=True)
Y = LABELS[SPECIES]
BINARY = {
    "1 first": (Y != 3, np.where(SPECIES == 0, 1, -1)),
    "-1 first": (Y != 3, np.where(SPECIES == 0, -1, 1)),
    "0 first": (Y != -2, np.where(SPECIES == 0, 0, 5)),
    "5 first": (Y != -2, np.where(SPECIES == 0, 5, 0)),
}
QUERY = np.random.default_rng(0).uniform(X.min(axis=0) - 1, X.max(axis=0) + 1, (500, 4))
GOOD = b"""svm_type c_svc
kernel_type rbf
gamma 0.5
nr_class 2
total_sv 3
rho 0.25
label 1 -1
nr_sv 2 1
SV
1 1:0.5 3:-1
0.5 2:2
-1.5 1:1 2:1e-3
"""


@pytest.fixture(scope="module")
def reference():
    """LIBSVM's own library, through its Python binding."""
    return pytest.importorskip("libsvm.svmutil", reason="libsvm-official is not installed (the dev extra has it)")


def libsvm_predict(reference, model, rows, precomputed=False):
    """Labels and decision values; svmutil.svm_predict has too small a buffer for nu_svc with three classes."""
    k = model.get_nr_class()
    buffer = (reference.c_double * max(1, k * (k - 1) // 2))()
    labels, values = [], []
    for row in rows:
        node, _ = reference.gen_svm_nodearray(np.append(0.0, row) if precomputed else row, isKernel=precomputed)
        labels.append(reference.libsvm.svm_predict_values(model, node, buffer))
        values.append(list(buffer))
    return np.array(labels), np.array(values)


def machines():
    yield "C, 3 classes", svm.SVC(C=10, decision_function_shape="ovo"), X, Y
    yield "C, 3 classes, sparse", svm.SVC(C=10, decision_function_shape="ovo"), sp.csr_array(X), Y
    yield "nu, 3 classes", svm.NuSVC(nu=0.3, decision_function_shape="ovo"), X, Y
    for name, (rows, y) in BINARY.items():
        yield f"C, {name}", svm.SVC(kernel="poly", degree=2, coef0=0.5, gamma=0.3), X[rows], y[rows]
    yield "nu, 2 classes", svm.NuSVC(kernel="linear", nu=0.2), X[Y != 3], Y[Y != 3]
    yield "epsilon", svm.SVR(C=2, epsilon=0.05), X[:, 1:], X[:, 0]
    yield "epsilon, no support vectors", svm.SVR(epsilon=100), X[:, 1:], X[:, 0]
    yield "nu, regression", svm.NuSVR(nu=0.3, kernel="linear"), X[:, 1:], X[:, 0]
    yield "one-class", svm.OneClassSVM(nu=0.2, gamma=0.3), X, None
    yield "scikit-learn's", peer.SVC(kernel="sigmoid", gamma=0.01, decision_function_shape="ovo"), X, Y
    yield "scikit-learn's, sparse", peer.SVC(C=3).fit(sp.csr_matrix(X), Y), sp.csr_matrix(X), (Y == 7).astype(int)


def decide(machine, rows):
    values = machine.decision_function(rows) if hasattr(machine, "decision_function") else machine.predict(rows)
    return values.reshape(len(rows), -1)


@pytest.mark.parametrize(("machine", "data", "y"), [c[1:] for c in machines()], ids=[c[0] for c in machines()])
def test_what_is_written_predicts_alike_in_libsvm_and_when_read_back(reference, tmp_path, machine, data, y):
    machine.fit(data, y)
    file = str(tmp_path / "m.model")
    libsvm.save_model(machine, file)
    rows = QUERY[:, -data.shape[1] :]
    asked = sp.csr_array(rows) if sp.issparse(data) else rows
    mine, values = machine.predict(asked), decide(machine, asked) if not sp.issparse(data) else None
    theirs, their_values = libsvm_predict(reference, reference.svm_load_model(file), rows)
    back = libsvm.load_model(file)
    assert type(back).__name__ == type(machine).__name__
    assert back.n_features_in_ == data.shape[1] if len(machine.support_) else not hasattr(back, "n_features_in_")
    again = back.set_params(**({"decision_function_shape": "ovo"} if hasattr(back, "classes_") else {}))
    if y is None or y.dtype.kind in "iu" or hasattr(machine, "classes_"):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(again.predict(rows), theirs)
    if values is not None:
        scale = np.abs(values).max() + np.abs(machine.dual_coef_).sum()
        np.testing.assert_allclose(their_values, values, rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(decide(again, rows), values, rtol=0, atol=1e-12 * scale)


TRAINED = ["-s 0 -t 2 -c 10", "-s 0 -t 0", "-s 0 -t 1 -r 1 -g 0.2", "-s 0 -t 3 -g 0.01", "-s 1 -n 0.3", "-s 3 -p 0.05",
           "-s 4 -n 0.3", "-s 2 -n 0.2"]  # fmt: skip


@pytest.mark.parametrize("options", TRAINED)
@pytest.mark.parametrize("n", [150, 100])
def test_what_libsvm_wrote_predicts_alike_here(reference, tmp_path, options, n):
    target = X[:n, 0] if options[3] in "34" else Y[:n].astype(float)
    model = reference.svm_train(target.tolist(), X[:n], options + " -q")
    file = str(tmp_path / "m.model")
    reference.svm_save_model(file, model)
    labels, values = libsvm_predict(reference, model, QUERY)
    mine = libsvm.load_model(file, n_features=4)
    if options[3] in "34":
        np.testing.assert_allclose(mine.predict(QUERY), labels, rtol=0, atol=1e-10)
        return
    np.testing.assert_array_equal(mine.predict(QUERY), labels)
    if options[3] in "01":
        mine.decision_function_shape = "ovo"
        first = model.get_labels()[0]
        sign = -1 if n == 100 and first == mine.classes_[0] else 1
        np.testing.assert_allclose(sign * decide(mine, QUERY), values, rtol=1e-9, atol=1e-9)


def test_a_file_that_is_read_and_written_again_is_the_same(reference, tmp_path):
    for k, options in enumerate(TRAINED):
        target = X[:, 0] if options[3] in "34" else Y.astype(float)
        reference.svm_save_model(str(tmp_path / "a"), reference.svm_train(target.tolist(), X, options + " -q"))
        first = libsvm.read_model(tmp_path / "a")
        libsvm.write_model(first, tmp_path / "b")
        second = libsvm.read_model(tmp_path / "b")
        for name in ("svm_type", "kernel", "degree", "gamma", "coef0"):
            assert getattr(first, name) == getattr(second, name), (k, name)
        for name in ("coef", "rho", "labels", "n_sv"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert abs(first.vectors - second.vectors).max() == 0


def test_equal_votes_fall_where_libsvm_lets_them_fall(reference, tmp_path):
    """Every pair votes for its first class, but the last one: each class has one vote, and 7 comes first."""
    file = tmp_path / "m.model"
    file.write_text(
        "svm_type c_svc\nkernel_type linear\nnr_class 3\ntotal_sv 0\nrho -1 1 -1\nlabel 7 -2 3\nnr_sv 0 0 0\nSV\n"
    )
    labels, _ = libsvm_predict(reference, reference.svm_load_model(str(file)), X[:1])
    assert libsvm.load_model(file, n_features=4).predict(X[:1]).tolist() == labels.tolist() == [7]


@pytest.mark.parametrize(("machine", "y"), [(svm.SVC(C=3), Y), (svm.SVR(), X[:, 0]), (svm.OneClassSVM(nu=0.3), None)])
def test_precomputed_kernels(reference, tmp_path, machine, y):
    order = np.random.default_rng(1).permutation(150)
    K, K_new = rbf_kernel(X[order], gamma=0.3), rbf_kernel(QUERY[:50], X[order], gamma=0.3)
    machine.set_params(kernel="precomputed").fit(K, None if y is None else y[order])
    file = str(tmp_path / "m.model")
    libsvm.save_model(machine, file)
    theirs, _ = libsvm_predict(reference, reference.svm_load_model(file), K_new, precomputed=True)
    np.testing.assert_allclose(machine.predict(K_new), theirs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(libsvm.load_model(file).predict(K_new), theirs, rtol=0, atol=1e-12)


def test_an_svdd_is_written_as_the_one_class_machine_that_decides_alike(tmp_path):
    machine = svm.SVDD(C=0.03, gamma=0.3).fit(X)
    libsvm.save_model(machine, tmp_path / "m.model")
    back = libsvm.load_model(tmp_path / "m.model")
    np.testing.assert_allclose(2 * back.decision_function(QUERY), machine.decision_function(QUERY), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"kernel must be rbf for an SVDD.*found 'linear'"):
        libsvm.save_model(svm.SVDD(kernel="linear").fit(X), tmp_path / "m.model")


def test_float32_features_are_written_exactly(tmp_path):
    single = X.astype(np.float32)
    machine = svm.SVC().fit(single, Y == 7)
    libsvm.save_model(machine, tmp_path / "m.model")
    back = libsvm.load_model(tmp_path / "m.model")
    where = {tuple(row) for row in back.support_vectors_}
    assert where == {tuple(row) for row in machine.support_vectors_.astype(np.float64)}


@pytest.mark.parametrize(
    ("machine", "y", "message"),
    [
        (svm.SVC(kernel="laplacian"), Y, "kernel must be one of linear.*found 'laplacian'"),
        (svm.SVC(kernel="cosine"), Y, "found 'cosine'"),
        (svm.SVC(kernel=rbf_kernel), Y, "found <function rbf_kernel"),
        (svm.SVC(), np.array(["a", "b", "c"])[SPECIES], "classes must be integers.*'a'"),
        (svm.SVC(), np.where(SPECIES == 0, 2.0**40, 1.0), "classes must be integers.*1099511627776"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, machine, y, message):
    machine.fit(X, y)
    with pytest.raises(ValueError, match=message):
        libsvm.save_model(machine, tmp_path / "m.model")
    assert list(tmp_path.iterdir()) == []


def test_other_estimators_and_those_not_fitted_are_refused(tmp_path):
    with pytest.raises(NotFittedError):
        libsvm.save_model(svm.SVC(), tmp_path / "m.model")
    with pytest.raises(ValueError, match="estimator must be one of SVC, NuSVC"):
        libsvm.save_model(peer.LinearSVC(), tmp_path / "m.model")


def test_probability_fields_are_ignored_with_a_warning(tmp_path):
    file = tmp_path / "m.model"
    file.write_bytes(GOOD)
    plain = libsvm.load_model(file)
    file.write_bytes(GOOD.replace(b"nr_sv", b"probA -1.5\nprobB 0.1\nnr_sv"))
    with pytest.warns(UserWarning, match="probA, probB ignored"):
        model = libsvm.load_model(file)
    np.testing.assert_array_equal(model.decision_function(QUERY[:, :3]), plain.decision_function(QUERY[:, :3]))


def test_columns_beyond_those_of_the_file(tmp_path):
    file = tmp_path / "m.model"
    file.write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"n_features must be at least 3.*got 2"):
        libsvm.load_model(file, n_features=2)
    wide = np.hstack([QUERY[:, :3], np.ones((500, 2))])
    narrow = libsvm.load_model(file)
    factor = np.exp(-0.5 * 2)  # of every kernel value
    expected = narrow.intercept_ + factor * (narrow.decision_function(QUERY[:, :3]) - narrow.intercept_)
    np.testing.assert_allclose(libsvm.load_model(file, n_features=5).decision_function(wide), expected, atol=1e-14)


# Broken files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        (b"c_svc", b"d_svc", 1, "found svm_type 'd_svc'; needs one of c_svc, nu_svc"),
        (b"rbf", b"laplacian", 2, "found kernel_type 'laplacian'; needs one of linear, polynomial"),
        (b"gamma 0.5\n", b"", 8, "found SV; needs a line gamma before it"),
        (b"gamma 0.5", b"gamma abc", 3, "found gamma 'abc'; needs a finite number"),
        (b"gamma 0.5", b"gamma nan", 3, "found gamma 'nan'; needs a finite number"),
        (b"gamma 0.5", b"gamma 1_0", 3, "found gamma '1_0'"),
        (b"gamma 0.5", b"gamma -1", 3, "needs gamma >= 0"),
        (b"gamma 0.5", b"gamma 0.5\ngamma 0.5", 4, r"found gamma a second time \(first on line 3\)"),
        (b"gamma 0.5", b"hello", 3, "found 'hello'; needs a field of LIBSVM's model files"),
        (b"gamma 0.5", b"\xff\x00", 3, r"found '\\\\xff"),
        (b"nr_class 2", b"nr_class 1", 4, "needs an integer from 2"),
        (b"nr_class 2", b"nr_class 2000000000", 6, "found 1 values of rho; needs 1999999999000000000"),
        (b"total_sv 3", b"total_sv 4", 8, "found nr_sv that sum to 3; needs the total_sv of line 5"),
        (b"total_sv 3", b"total_sv 1000000000000", 5, "found total_sv '1000000000000'; needs an integer from 0"),
        (b"total_sv 3", b"total_sv -3", 5, "found total_sv '-3'"),
        (b"3\nrho 0.25\nlabel 1 -1\nnr_sv 2 1", b"2000000000\nrho 0.25\nlabel 1 -1\nnr_sv 1999999999 1", 13,
         "found the end of the file after 3 support vectors; needs total_sv = 2000000000"),
        (b"rho 0.25", b"rho 0.25 1", 6, "found 2 values of rho; needs 1 for nr_class 2"),
        (b"label 1 -1", b"label 1 1", 7, "found the same label twice"),
        (b"label 1 -1", b"label 1 x", 7, "found label 'x'; needs an integer"),
        (b"nr_sv 2 1\n", b"", 8, "needs a line nr_sv before it"),
        (b"\nSV\n", b"\n", 9, "found '1'; needs a field"),
        (b"SV\n1 1:0.5", b"SV\nx 1:0.5", 10, "found coefficient 'x'"),
        (b"0.5 2:2", b"inf 2:2", 11, "found coefficient 'inf'; needs a finite number"),
        (b"0.5 2:2", b"0.5 2", 11, "found '2'; needs index:value"),
        (b"0.5 2:2", b"0.5 2:", 11, "found value ''"),
        (b"0.5 2:2", b"0.5 0:2", 11, "found index '0'; needs an integer from 1"),
        (b"0.5 2:2", b"0.5 2:2 2:1", 11, "found index 2 after 2; needs indices that rise"),
        (b"0.5 2:2", b"0.5 99999999999999999999:2", 11, "found index '99999999999999999999'"),
        (b"1:1 2:1e-3\n", b"1:1\n0.5 1:2\n", 13, "found one more support vector"),
        (b"-1.5 1:1 2:1e-3\n", b"", 12, "found the end of the file after 2 support vectors"),
        (b"c_svc", b"epsilon_svr", 7, "found label; needs no label with epsilon_svr"),
        (b"rbf\ngamma 0.5", b"precomputed", 9, "needs 0:row"),
    ],
)  # fmt: skip
def test_a_broken_model_is_named_with_its_line(tmp_path, old, new, line, message):
    assert GOOD.count(old) == 1
    file = tmp_path / "broken.model"
    file.write_bytes(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=rf"broken.model, line {line}: .*{message}"):
        libsvm.load_model(file)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "m").write_bytes(b"")
    with pytest.raises(ValueError, match="line 1: found the end of the file; needs a line SV"):
        libsvm.load_model(tmp_path / "m")
    with pytest.raises(OSError, match="No such file"):
        libsvm.load_model(tmp_path / "missing")


PIECES = [*GOOD.split(), b"\n", b" ", b"0", b"-1", b"1e999", b"1000000000000", b"2147483647:1", b"::", b"\x00", b"\xff"]
MUTATIONS = st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(PIECES)), max_size=4)


def try_to_load(file):
    """Load, or a ValueError of one line that names the file; memory follows the file, not what it claims."""
    problem = None
    tracemalloc.start()
    try:
        libsvm.load_model(file)
    except ValueError as error:
        problem = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5e6
    assert problem is None or (str(file) in problem and "\n" not in problem)


@given(mutations=MUTATIONS)
def test_damaged_models_are_loaded_or_refused(tmp_path_factory, mutations):
    data = GOOD
    for at, length, piece in mutations:
        data = data[:at] + piece + data[at + length :]
    file = tmp_path_factory.getbasetemp() / "damaged.model"
    file.write_bytes(data)
    try_to_load(file)


@given(data=st.binary(max_size=200), keep=st.integers(0, len(GOOD)))
def test_random_bytes_are_refused(tmp_path_factory, data, keep):
    file = tmp_path_factory.getbasetemp() / "random.model"
    file.write_bytes(GOOD[:keep] + data)
    try_to_load(file)


# Data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".svm", ".svm.gz", ".svm.bz2"])
def test_data_are_read_as_written(tmp_path, suffix):
    plain = tmp_path / "d.svm"
    libsvm.write_data(X, Y, plain)
    file = tmp_path / f"d{suffix}"
    packed = {".svm": bytes, ".svm.gz": gzip.compress, ".svm.bz2": bz2.compress}[suffix](plain.read_bytes())
    file.write_bytes(packed)
    data, y = libsvm.read_data(file, n_features=6)
    assert sp.issparse(data)
    assert data.indices.dtype == data.indptr.dtype == np.int32
    np.testing.assert_array_equal(data.toarray(), np.hstack([X, np.zeros((150, 2))]))
    np.testing.assert_array_equal(y, Y)
    assert libsvm.read_data(file, dtype=np.float32)[0].dtype == np.float32


def test_kernel_values_are_read_with_their_row_numbers(tmp_path):
    (tmp_path / "k.svm").write_text("1 0:1 1:4 2:-2\n-1 0:2 1:-2 2:5\n")
    data, y = libsvm.read_data(tmp_path / "k.svm", precomputed=True)
    np.testing.assert_array_equal(data, [[1, 4, -2], [2, -2, 5]])
    np.testing.assert_array_equal(y, [1, -1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no data; needs lines like"),
        (b"# nothing\n", "found no data"),
        (b"1 1:1\nx 1:1\n", "line 2: found label 'x'; needs a finite number"),
        (b"1 1:1\n1 0:1\n", r"line 2: found index 0; needs indices from 1 \(dump_svmlight_file"),
        (b"1 3:1 2:1\n", "line 1: found index 2 after 3; needs indices that rise"),
        (b"# head\n\n1 1:x\n", "line 3: found value 'x'"),
        (b"1 1\n", "line 1: found '1'; needs index:value"),
        (b"1 99999999999:1\n", "line 1: found index '99999999999'; needs an integer from 1"),
        (b"1 1:nan\n", "line 1: found value 'nan'; needs a finite number"),
        (b"nan 1:1\n", "line 1: found label 'nan'"),
        (b"1,2 1:1\n", "line 1: found label '1,2'"),
        (b"\x00\xff\n", "line 1: found label"),
    ],
)
def test_broken_data_are_named_with_their_line(tmp_path, content, message):
    for name, packed in (("d.svm", content), ("d.svm.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            libsvm.read_data(tmp_path / name)


def test_broken_archives_and_missing_files_are_named(tmp_path):
    for name, pack in (("d.gz", gzip.compress), ("d.bz2", bz2.compress)):
        (tmp_path / name).write_bytes(pack(b"1 1:1\n" * 1000)[:-9])
        with pytest.raises(ValueError, match=f"{name}: the compressed file is broken"):
            libsvm.read_data(tmp_path / name)
        (tmp_path / name).write_bytes(b"1 1:1\n")
        with pytest.raises(ValueError, match=f"{name}: the compressed file is broken"):
            libsvm.read_data(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        libsvm.read_data(tmp_path / "missing.svm")


@given(data=st.lists(st.sampled_from([b"1", b" ", b"\n", b":", b"2:3", b"-1", b"#", b"qid:1", b"\xff", b"1e999"])))
def test_any_data_are_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.svm"
    file.write_bytes(b"".join(data))
    problem = None
    try:
        rows, y = libsvm.read_data(file)
        assert rows.shape[0] == len(y) > 0
    except ValueError as error:
        problem = str(error)
    assert problem is None or str(file) in problem
