"""Problems on which SVM solvers hang or fail: each converges to its tolerance in a minute, or stops and says why."""

import os
import subprocess
import sys
import textwrap
import time
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn import svm as peers
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics.pairwise import linear_kernel, polynomial_kernel, rbf_kernel

import bcd.svm as module
from bcd import Status
from bcd.svm import SVC, SVDD, SVR, NuSVC, NuSVR, OneClassSVM

pytestmark = pytest.mark.timeout(60)  # seconds: what the issue allows a case


@pytest.fixture
def solved(monkeypatch):
    """Every (dual, result) of the machines of a test."""
    seen = []
    original = module.solve_dual

    def spy(gram, dual, *args, **kwargs):
        seen.append((dual, original(gram, dual, *args, **kwargs)))
        return seen[-1][1]

    monkeypatch.setattr(module, "solve_dual", spy)
    return seen


def violation(dual, x, K):
    """LIBSVM's, in float64, from the problem and x; inf where x is not feasible."""
    n = len(K)
    labels = dual.labels if len(dual.labels) else np.zeros(len(x), int)
    sums = np.bincount(labels, x, len(dual.totals))
    scale = 1 + np.abs(x).sum()
    if (x < dual.lower).any() or (x > dual.upper).any() or np.abs(sums - dual.totals).max() > 1e-9 * scale:
        return np.inf
    grad = dual.linear + (K @ x if len(x) == n else np.tile(K @ (x[:n] + x[n:]), 2))
    worst = 0.0
    for s in range(len(dual.totals)):
        rise, fall = (labels == s) & (x < dual.upper), (labels == s) & (x > dual.lower)
        if rise.any() and fall.any():
            worst = max(worst, grad[fall].max() - grad[rise].min())
    return worst


def noise_of(K, x):
    """What float64 itself loses in K x."""
    return 8 * np.finfo(float).eps * float((np.abs(K) @ np.abs(x)).max())


def assert_solved(machine, solved, K):
    assert machine.status_ is Status.CONVERGED
    assert machine.fit_status_ == 0
    dual, result = solved[-1]
    x = result.x if len(result.x) == len(K) else result.x[: len(K)] + result.x[len(K) :]
    assert violation(dual, result.x, K) <= machine.tol + noise_of(K, x)
    assert machine.violation_ <= machine.tol
    assert 0 <= machine.duality_gap_ < np.inf


def noisy(n, seed=0, d=5):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, np.where(X[:, 0] + 0.5 * rng.normal(size=n) > 0, 1, -1)


# High C -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1e4, 1e5, 1e6])
def test_high_c(C, solved):
    X, y = noisy(300)
    machine = SVC(C=C, gamma=0.1).fit(X, y)
    assert_solved(machine, solved, rbf_kernel(X, gamma=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("C", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_high_c_on_many_rows(C, dtype, solved):
    X, y = noisy(2000)
    machine = SVC(C=C, gamma=0.1).fit(X.astype(dtype), y)
    assert_solved(machine, solved, rbf_kernel(X.astype(dtype).astype(float), gamma=0.1))


@pytest.mark.parametrize("C", [1e4, 1e6])
def test_high_c_regression(C, solved):
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:200], y[:200]
    machine = SVR(C=C, gamma=1.0, epsilon=1.0).fit(X, y)
    assert_solved(machine, solved, rbf_kernel(X, gamma=1.0))


def test_hard_margin_by_a_large_c(solved):
    rng = np.random.default_rng(0)
    X = np.vstack([rng.normal(size=(40, 2)) - 5, rng.normal(size=(40, 2)) + 5])
    machine = SVC(C=1e6, kernel="linear").fit(X, np.repeat([0, 1], 40))
    assert machine.status_ is Status.CONVERGED
    margins = np.where(np.arange(80) < 40, -1, 1) * machine.decision_function(X)
    assert margins.min() == pytest.approx(1, abs=2e-3)


def test_an_infinite_c_is_refused():
    """Where the classes cannot be separated, its dual has no solution."""
    with pytest.raises(ValueError, match=r"'C' parameter of SVC must be a float in the range \(0.0, inf\)"):
        SVC(C=np.inf).fit([[0.0], [1.0]], [0, 1])


# Features as they come ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
@pytest.mark.parametrize("C", [1, 100])
def test_unscaled_features(kernel, C, solved):
    """Columns from 1e-3 to 1e3 side by side."""
    X, y = load_wine(return_X_y=True)
    y = np.where(y == 1, 1, -1)
    machine = SVC(C=C, kernel=kernel).fit(X, y)
    assert_solved(machine, solved, rbf_kernel(X, gamma=machine._gamma) if kernel == "rbf" else linear_kernel(X))


@pytest.mark.slow
def test_unscaled_features_of_more_rows(solved):
    X, y = load_breast_cancer(return_X_y=True)
    machine = SVC(C=1, kernel="linear").fit(X, y)
    assert_solved(machine, solved, linear_kernel(X))


def test_huge_and_tiny_features(solved):
    X, y = noisy(100)
    for scale in (1e-8, 1e8):
        machine = SVC().fit(scale * X, y)
        assert_solved(machine, solved, rbf_kernel(scale * X, gamma=machine._gamma))
        np.testing.assert_allclose(
            machine.decision_function(scale * X), SVC().fit(X, y).decision_function(X), atol=5e-3
        )


@pytest.mark.parametrize("kind", [SVC, SVR, NuSVR, OneClassSVM, SVDD])
def test_constant_features(kind, solved):
    X, y = np.full((12, 3), 7.0), np.arange(12) % 2
    machine = kind().fit(X, y)
    assert_solved(machine, solved, np.ones((12, 12)))
    assert np.ptp(machine.predict(X)) == 0


def test_one_constant_feature_changes_nothing():
    X, y = noisy(100)
    plain, wider = (SVC(gamma=0.2, tol=1e-8).fit(Z, y) for Z in (X, np.column_stack([X, np.full(100, 1000.0)])))
    assert plain.dual_objective_ == pytest.approx(wider.dual_objective_, rel=1e-6)


def test_one_feature_and_lists():
    X = np.arange(10.0)
    machine = SVC(kernel="linear", C=100).fit(X[:, None].tolist(), (X > 4).tolist())
    assert machine.predict([[4.4], [4.6]]).tolist() == [False, True]
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        SVC().fit(X, X > 4)


# Labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1.0, 1e3, 1e6])
def test_duplicate_points_with_opposite_labels(C, solved):
    X, y = noisy(60)
    X, y = np.vstack([X, X, X[:20]]), np.concatenate([y, -y, y[:20]])
    machine = SVC(C=C, gamma=0.5).fit(X, y)
    assert_solved(machine, solved, rbf_kernel(X, gamma=0.5))


def test_only_duplicates_with_opposite_labels(solved):
    """Nothing can be learnt, and that is the answer."""
    X = np.random.default_rng(0).normal(size=(30, 3))
    machine = SVC(C=10).fit(np.vstack([X, X]), np.repeat([0, 1], 30))
    assert_solved(machine, solved, rbf_kernel(np.vstack([X, X]), gamma=machine._gamma))
    assert np.abs(machine.decision_function(X)).max() < 0.01


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("C", [1, 1e3])
@pytest.mark.parametrize("container", [np.asarray, sp.csr_array])
def test_linear_kernel(separable, C, container, solved):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 10))
    score = X[:, 0] + X[:, 1] + (0 if separable else 1) * rng.normal(size=200)
    X, y = X[np.abs(score) > 0.1], np.where(score > 0, 1, -1)[np.abs(score) > 0.1]
    machine = SVC(kernel="linear", C=C).fit(container(X), y)
    assert_solved(machine, solved, linear_kernel(X))
    assert (machine.score(container(X), y) == 1) == separable or C == 1


@pytest.mark.slow
@pytest.mark.parametrize("C", [1, 100, 1e4])
def test_linear_kernel_with_many_rows_and_few_features(C, solved):
    """K has rank 5; LIBSVM takes millions of steps here."""
    X, y = noisy(2000)
    machine = SVC(kernel="linear", C=C).fit(X, y)
    assert_solved(machine, solved, linear_kernel(X))


@pytest.mark.parametrize("kind", [SVC, NuSVC])
def test_one_sample_per_class(kind):
    X = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    machine = kind(kernel="linear", **({"C": 100} if kind is SVC else {})).fit(X, ["a", "b", "c"])
    assert machine.predict(X).tolist() == ["a", "b", "c"]
    two = kind(kernel="linear", **({"C": 100} if kind is SVC else {})).fit(X[:2], [0, 1])
    np.testing.assert_allclose(two.decision_function([[0.5, 9], [1, 9], [1.5, 9]]), [-0.5, 0, 0.5], atol=1e-3)


@pytest.mark.parametrize("kind", [SVC, NuSVC])
def test_all_labels_equal(kind):
    with pytest.raises(ValueError, match=r"y must hold at least two classes; .* 1 class \('x'\)"):
        kind().fit(np.eye(4), ["x"] * 4)


def test_one_row_against_many(solved):
    X, _ = noisy(300)
    y = np.zeros(300, int)
    y[7] = 1
    for C in (1, 1e5):
        machine = SVC(C=C, gamma=0.5).fit(X, y)
        assert_solved(machine, solved, rbf_kernel(X, gamma=0.5))
    assert machine.predict(X)[7] == 1
    with pytest.raises(ValueError, match=r"the largest feasible nu is 0\.00666667"):
        NuSVC().fit(X, y)
    NuSVC(nu=1 / 150, gamma=0.5).fit(X, y)


def test_sixty_classes():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 6))
    y = np.arange(400) % 60
    machine = SVC(C=10, gamma=1.0).fit(X, y)
    assert machine.dual_coef_.shape[0] == 59
    assert (machine.predict(X) == y).mean() > 0.9


# Few rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SVR, NuSVR, OneClassSVM, SVDD])
def test_a_single_row(kind, solved):
    machine = kind().fit([[1.0, 2.0]], [3.0])
    assert_solved(machine, solved, np.ones((1, 1)))
    assert np.isfinite(machine.predict([[1.0, 2.0], [4.0, 4.0]])).all()


@pytest.mark.parametrize("kind", [SVC, NuSVC])
def test_a_single_row_has_no_two_classes(kind):
    with pytest.raises(ValueError, match="at least two classes"):
        kind().fit([[1.0, 2.0]], [1])


@pytest.mark.parametrize("n", [2, 3, 5, 9])
@pytest.mark.parametrize("kind", [SVC, NuSVC, SVR, NuSVR, OneClassSVM, SVDD])
def test_fewer_rows_than_a_block(kind, n, solved):
    rng = np.random.default_rng(n)
    X = rng.normal(size=(n, 2))
    y = np.arange(n) % 2
    machine = kind(**({"nu": 0.4} if kind is NuSVC else {})).fit(X, y)
    assert_solved(machine, solved, rbf_kernel(X, gamma=machine._gamma))


# Extreme nu, epsilon, kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [1e-4, 0.999, 1.0])
def test_extreme_nu(nu, solved):
    X, y = noisy(100)
    y = np.where(np.arange(100) % 2, 1, -1)  # classes of equal size, so nu = 1 is feasible
    K = rbf_kernel(X, gamma=0.3)
    for machine in (NuSVC(nu=nu, gamma=0.3), NuSVR(nu=nu, gamma=0.3), OneClassSVM(nu=nu, gamma=0.3)):
        machine.fit(X, y)
        assert_solved(machine, solved, K)


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 1e6])
def test_extreme_epsilon(epsilon, solved):
    X, _ = noisy(100)
    machine = SVR(epsilon=epsilon, gamma=0.3, C=10).fit(X, X[:, 0])
    assert_solved(machine, solved, rbf_kernel(X, gamma=0.3))
    assert epsilon < 1 or len(machine.support_) == 0


@pytest.mark.parametrize("gamma", [1e-12, 1e6])
def test_kernels_that_are_nearly_constant_or_the_identity(gamma, solved):
    X, y = noisy(100)
    machine = SVC(gamma=gamma, C=10).fit(X, y)
    assert_solved(machine, solved, rbf_kernel(X, gamma=gamma))


def test_a_polynomial_of_high_degree(solved):
    X, y = noisy(80)
    machine = SVC(kernel="poly", degree=6, gamma=0.2, coef0=1, C=1).fit(X, y)
    assert_solved(machine, solved, polynomial_kernel(X, degree=6, gamma=0.2, coef0=1))


# Matrices that are no kernels ---------------------------------------------------------------------------------


def indefinite(n, level):
    X, y = noisy(n)
    noise = np.random.default_rng(1).normal(size=(n, n))
    return rbf_kernel(X, gamma=0.5) + level * (noise + noise.T), y


@pytest.mark.parametrize("level", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("C", [1, 1e3])
@pytest.mark.parametrize("kind", [SVC, SVR])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_precomputed_with_noise_stops_with_a_status_that_is_true(kind, C, level, solved):
    K, y = indefinite(120, level)
    machine = kind(kernel="precomputed", C=C).fit(K, y)
    dual, result = solved[-1]
    x = result.x if len(result.x) == len(K) else result.x[: len(K)] + result.x[len(K) :]
    found = violation(dual, result.x, K)
    assert machine.violation_ == pytest.approx(found, rel=1e-6, abs=noise_of(K, x) + 1e-9)
    assert machine.status_ in (Status.CONVERGED, Status.STAGNATED)
    if machine.status_ is Status.CONVERGED:
        assert found <= machine.tol + noise_of(K, x)
    assert np.isfinite(machine.decision_function(K) if kind is SVC else machine.predict(K)).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_sigmoid_kernels_stop():
    """Not positive semidefinite in general."""
    X, y = noisy(100)
    machine = SVC(kernel="sigmoid", gamma=2.0, coef0=-1.0, C=100).fit(X, y)
    assert machine.status_ in (Status.CONVERGED, Status.STAGNATED)
    assert machine.predict(X).shape == (100,)


# Limits -------------------------------------------------------------------------------------------------------


def test_no_default_limit():
    for kind in (SVC, NuSVC, SVR, NuSVR, OneClassSVM, SVDD):
        assert kind().max_iter == -1
        assert kind().time_limit is None


def drowsy(A, B):
    """A kernel that takes its time, so that every machine is slow enough."""
    if len(A) > 1:
        time.sleep(0.3)
    return rbf_kernel(A, B, gamma=0.1)


def test_a_time_limit_is_kept():
    X, y = noisy(300)
    started = time.perf_counter()
    with pytest.warns(ConvergenceWarning, match="Stopped at time_limit"):
        machine = SVC(kernel=drowsy, C=1e4, tol=1e-9, time_limit=0.5).fit(X, y)
    assert 0.5 < time.perf_counter() - started < 4
    assert machine.status_ is Status.TIME_LIMIT
    assert np.isfinite(machine.duality_gap_)
    assert machine.predict(X).shape == (300,)


CTRL_C = """
import os, signal, threading, time, warnings
import numpy as np
from sklearn.metrics.pairwise import rbf_kernel
from bcd import Status
from bcd.svm import SVC
warnings.simplefilter("ignore")
rng = np.random.default_rng(0)
X = rng.normal(size=(300, 5))
y = np.where(X[:, 0] + rng.normal(size=300) > 0, 1, -1)
SVC().fit(X[:100], y[:100])  # compiled code is loaded
pressed = []
def drowsy(A, B):
    if len(A) > 64 and not pressed:  # the diagonal is asked for in squares of 64, before the solver runs
        pressed.append(threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start())
    if len(A) > 64:
        time.sleep(0.5)
    return rbf_kernel(A, B, gamma=0.1)
machine = SVC(kernel=drowsy, C=1e4, tol=1e-9).fit(X, y)
assert machine.status_ is Status.INTERRUPTED, machine.status_
assert np.isfinite(machine.duality_gap_)
machine.predict(X)
print("kept")
"""


@pytest.mark.slow
def test_ctrl_c_from_outside():
    run = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, timeout=55, check=False)
    assert run.stdout.strip() == "kept", run.stderr


# Memory -------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, warnings
import numpy as np, scipy.sparse as sp
from bcd.svm import SVC
warnings.simplefilter("ignore")
rng = np.random.default_rng(0)
n, d, cache, sparse = {n}, {d}, {cache}, {sparse}
if sparse:
    X = sp.random_array((n, d), density=0.02, format="csr", rng=rng)
else:
    X = rng.normal(size=(n, d)).astype(np.float32)
y = np.where(rng.random(n) < 0.3, 1, -1)
SVC().fit(X[:200], y[:200]).predict(X[:200])  # compiled code is loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
machine = SVC(C=10, gamma=1.0 / d, cache_size=cache, time_limit=20).fit(X, y)
machine.predict(X[:5000])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, machine.n_columns_)
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("n", "d", "cache", "sparse"), [(20_000, 50, 100, False), (20_000, 50, 400, False), (20_000, 2_000, 100, True)]
)
def test_peak_memory(n, d, cache, sparse):
    """At most data + cache_size + 300 MB; the data lie there before."""
    code = textwrap.dedent(MEMORY).format(n=n, d=d, cache=cache, sparse=sparse)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=190, check=False)
    assert run.returncode == 0, run.stderr
    grown, columns = map(float, run.stdout.split())
    assert columns > 500  # the kernel matrix would take 1600 MB in float32
    data = n * d * (0.02 * 12 if sparse else 4) / 2**20
    assert grown <= data + cache + 300


def test_memory_of_prediction_is_bounded():
    """K(test, support vectors) would take 320 MB."""
    X, y = noisy(2000)
    machine = SVC(C=0.01, cache_size=20).fit(X, y)
    test = np.random.default_rng(0).normal(size=(20_000, 5))
    machine.decision_function(test[:10])
    assert len(machine.support_) * len(test) * 8 > 200e6
    tracemalloc.start()
    machine.decision_function(test)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


# As the peers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("BCD_DATA" not in os.environ, reason="BCD_DATA names no folder with the data sets")
@pytest.mark.parametrize(
    ("name", "C", "gamma"), [("german_scale", 1000, 0.1), ("svmguide1_scale", 1000, 2), ("svmguide3", 128, 0.125)]
)
def test_hard_real_problems_no_worse_than_libsvm(name, C, gamma, solved):
    from experiments.data import load

    X, y = load(name)
    X = X.toarray() if sp.issparse(X) else X
    machine = SVC(C=C, gamma=gamma).fit(X, y)
    K = rbf_kernel(X, gamma=gamma)
    assert_solved(machine, solved, K)
    peer = peers.SVC(C=C, gamma=gamma, cache_size=1000).fit(X, y)
    b = np.zeros(len(y))
    b[peer.support_] = peer.dual_coef_[0]
    theirs = b @ K @ b / 2 - np.where(y == peer.classes_[1], 1, -1) @ b
    assert machine.dual_objective_ <= theirs + max(machine.duality_gap_, 1e-6 * abs(theirs))
