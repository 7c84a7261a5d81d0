"""bcd.svm against scikit-learn's five machines, and by certificates computed here from the problem alone."""

import os
import signal
import time
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn import svm as peers
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.preprocessing import scale

import bcd.dual as dual_module
import bcd.gram as gram_module
import bcd.svm as module
from bcd import Status
from bcd.svm import SVC, SVDD, SVR, NuSVC, NuSVR, OneClassSVM
from experiments.data import load

MACHINES = (SVC, NuSVC, SVR, NuSVR, OneClassSVM, SVDD)
PEERS = {SVC: peers.SVC, NuSVC: peers.NuSVC, SVR: peers.SVR, NuSVR: peers.NuSVR, OneClassSVM: peers.OneClassSVM}
FIVE = tuple(PEERS)


# Real problems ------------------------------------------------------------------------------------------------


def toy(bunch):
    return scale(bunch.data), bunch.target


@cache
def real(name):
    """Data by name: scikit-learn's own, else a file of BCD_DATA."""
    if name == "breast_cancer":
        X, y = toy(load_breast_cancer())
        return X, np.where(y == 1, 1.0, -1.0)
    if name == "diabetes":
        X, y = toy(load_diabetes())
        return X, y / 10
    if name == "digits":
        X, y = load_digits(return_X_y=True)
        return X / 16, np.where(y % 2 == 0, 1.0, -1.0)
    if "BCD_DATA" not in os.environ:
        pytest.skip("the environment variable BCD_DATA names no folder with the data sets (svm/NAME.bz2)")
    X, y = load(name)
    if name == "usps":
        y = np.where(y % 2 == 0, 1.0, -1.0)
    return X, y


def subset(X, y, n):
    """N rows in a fixed random order; both classes are in it."""
    order = np.random.default_rng(0).permutation(len(y))[:n]
    return X[order], y[order]


# machine, data, rows in the quick run, parameters
PROBLEMS = [
    (SVC, "heart_scale", 270, {"gamma": 1 / 13}),
    (SVC, "german_scale", 1000, {"gamma": 1 / 24}),
    (SVC, "svmguide1_scale", 1000, {"C": 2, "gamma": 2}),
    (SVC, "svmguide3", 600, {"C": 8, "gamma": 0.125}),
    (SVC, "spambase_std", 1000, {"C": 10, "gamma": 1 / 57}),
    (SVC, "mushrooms", 1000, {"C": 10, "gamma": 0.125}),
    (SVC, "reuters", 800, {"gamma": 1}),
    (SVC, "reuters", 800, {"kernel": "linear"}),
    (SVC, "usps", 1000, {"C": 10, "gamma": 2**-7}),
    (SVC, "a9a", 1000, {"C": 1, "gamma": 1 / 123}),
    (SVC, "ijcnn1", 1000, {"C": 32, "gamma": 2}),
    (SVC, "w8a", 1000, {"C": 10, "gamma": 0.05}),
    (SVC, "breast_cancer", 569, {"kernel": "poly", "gamma": 1 / 30, "coef0": 1}),
    (SVC, "digits", 1000, {"C": 5, "gamma": 0.05}),
    (NuSVC, "heart_scale", 270, {"nu": 0.5, "gamma": 1 / 13}),
    (NuSVC, "breast_cancer", 569, {"nu": 0.2, "gamma": 1 / 30}),
    (NuSVC, "usps", 1000, {"nu": 0.1, "gamma": 2**-7}),
    (NuSVC, "svmguide1_scale", 1000, {"nu": 0.1, "gamma": 2}),
    (SVR, "abalone_scale", 1000, {"C": 10, "epsilon": 0.5, "gamma": 1 / 8}),
    (SVR, "cpusmall_scale", 1000, {"C": 100, "epsilon": 1, "gamma": 1}),
    (SVR, "calhousing_std", 1000, {"C": 10, "epsilon": 0.1, "gamma": 1 / 8}),
    (SVR, "diabetes", 442, {"kernel": "linear", "epsilon": 1}),
    (NuSVR, "abalone_scale", 1000, {"C": 10, "nu": 0.3, "gamma": 1 / 8}),
    (NuSVR, "calhousing_std", 600, {"C": 1, "nu": 0.5, "gamma": 1 / 8}),
    (NuSVR, "diabetes", 442, {"C": 1, "gamma": 0.1}),
    (OneClassSVM, "a9a", 1000, {"nu": 0.2, "gamma": 1 / 123}),
    (OneClassSVM, "breast_cancer", 569, {"nu": 0.1, "gamma": 1 / 30}),
    (OneClassSVM, "usps", 1000, {"nu": 0.5, "gamma": 2**-7}),
]
FULL = [p for p in PROBLEMS if p[1] in ("svmguide1_scale", "spambase_std", "mushrooms", "usps", "abalone_scale", "w8a")]


def label(problem):
    machine, name, _, parameters = problem
    return f"{machine.__name__}-{name}-{parameters.get('kernel', 'rbf')}"


# Certificates -------------------------------------------------------------------------------------------------


def kernel_matrix(machine, X):
    """K in float64, by scikit-learn."""
    if machine.kernel == "precomputed":
        return np.asarray(X, float)
    if callable(machine.kernel):
        return machine.kernel(X, X)
    names = {
        "rbf": ["gamma"],
        "laplacian": ["gamma"],
        "poly": ["gamma", "degree", "coef0"],
        "sigmoid": ["gamma", "coef0"],
    }
    values = {"gamma": machine._gamma, "degree": machine.degree, "coef0": machine.coef0}
    K = pairwise_kernels(X, metric=machine.kernel, **{k: values[k] for k in names.get(machine.kernel, [])})
    return K.toarray() if sp.issparse(K) else np.asarray(K, float)


def hinges(values, weights, total):
    """min over t of ``-total t + sum weights max(0, t + values)``: the best multiplier of one sum.

    The minimum of this convex piecewise linear function lies at a kink; slopes beyond the last are total's.
    """
    kinks = np.sort(-values)
    loss = np.maximum(0, kinks[:, None] + values) @ weights - total * kinks
    return loss.min()


def best_primal(machine, K, y, b, weight):
    """Primal objective at w = sum b_i phi(x_i), by its definition, with the best intercept (and rho, epsilon)."""
    f = K @ b
    square = b @ f / 2
    if isinstance(machine, SVC | peers.SVC):
        C = machine.C * weight
        t = y - f  # kinks of the intercept
        return square + (np.maximum(0, 1 - y * (f + t[:, None])) @ C).min()
    if isinstance(machine, NuSVC | peers.NuSVC):
        # rho = (r + s) / 2, intercept = (s - r) / 2: the two classes part
        up, down, half = y > 0, y < 0, machine.nu * weight.sum() / 2
        return square + hinges(-f[up], weight[up], half) + hinges(f[down], weight[down], half)
    if isinstance(machine, SVR | peers.SVR):
        C = machine.C * weight
        t = np.concatenate([y - f - machine.epsilon, y - f + machine.epsilon])
        return square + (np.maximum(0, np.abs(y - f - t[:, None]) - machine.epsilon) @ C).min()
    if isinstance(machine, NuSVR | peers.NuSVR):
        # epsilon + intercept = -r, epsilon - intercept = -s: the two sides part
        C = machine.C * weight
        half = machine.nu * C.sum() / 2
        return square + hinges(y - f, C, half) + hinges(f - y, C, half)
    if isinstance(machine, OneClassSVM | peers.OneClassSVM):
        return square + hinges(-f, weight, machine.nu * weight.sum())
    # SVDD, halved: |phi(x) - c|^2 = K_ii - 2 f + b'Kb; hinge in R^2 / 2
    distance = (np.diag(K) - 2 * f + b @ f) / 2
    radius = distance[:, None]
    return (radius[:, 0] + np.maximum(0, distance - radius) @ (machine.C * weight)).min()


def dual_value(machine, K, y, b):
    """The minimised dual objective as a function of b = p + m, where p and m are not both needed."""
    value = b @ K @ b / 2
    if isinstance(machine, SVC | peers.SVC | NuSVR | peers.NuSVR):
        return value - y @ b
    if isinstance(machine, SVR | peers.SVR):
        return value - y @ b + machine.epsilon * np.abs(b).sum()
    if isinstance(machine, SVDD):
        return value - np.diag(K) @ b / 2
    return value


def violation(dual, x, K):
    """LIBSVM's: the largest difference of two gradient entries whose coordinates can be traded; inf: not feasible."""
    n = len(K)
    labels = dual.labels if len(dual.labels) else np.zeros(len(x), int)
    sums = np.array([x[labels == s].sum() for s in range(len(dual.totals))])
    slack = 1e-10 * (1 + np.abs(x).sum())
    if (x < dual.lower).any() or (x > dual.upper).any() or np.abs(sums - dual.totals).max() > slack:
        return np.inf
    grad = dual.linear + (K @ x if len(x) == n else np.tile(K @ (x[:n] + x[n:]), 2))
    worst = 0.0
    for s in range(len(dual.totals)):
        rise, fall = (labels == s) & (x < dual.upper), (labels == s) & (x > dual.lower)
        if rise.any() and fall.any():
            worst = max(worst, grad[fall].max() - grad[rise].min())
    return worst


def margin_scale(machine, coefficients, weight):
    """What a NuSVC was divided by (1 for the others)."""
    if isinstance(machine, NuSVC | peers.NuSVC):
        return machine.nu * weight.sum() / np.abs(coefficients).sum()
    return 1.0


def spread(machine, n):
    """b of a fitted machine with one row of coefficients, before the division of NuSVC."""
    b = np.zeros(n)
    dual_coef = machine.dual_coef_
    b[machine.support_] = np.ravel(dual_coef.toarray() if sp.issparse(dual_coef) else dual_coef)
    return b


def values_of(machine, X):
    return machine.decision_function(X) if hasattr(machine, "decision_function") else machine.predict(X)


def solved(monkeypatch):
    """Keep every (gram, dual, result) that the machines see."""
    seen = []
    original = module.solve_dual

    def spy(gram, dual, *args, **kwargs):
        seen.append((gram, dual, original(gram, dual, *args, **kwargs)))
        return seen[-1][2]

    monkeypatch.setattr(module, "solve_dual", spy)
    return seen


def fit(machine, X, y, **options):
    return (
        machine.fit(X, **options)
        if isinstance(machine, OneClassSVM | peers.OneClassSVM | SVDD)
        else machine.fit(X, y, **options)
    )


def compare_with_peer(problem, n, monkeypatch, tol=1e-5, rounding_of_sums=1e-8):
    kind, name, _, parameters = problem
    X, y = subset(*real(name), n)
    seen = solved(monkeypatch)
    ours = fit(kind(tol=tol, cache_size=500, **parameters), X, y)
    theirs = fit(PEERS[kind](tol=tol, cache_size=500, **parameters), X, y)
    K, weight = kernel_matrix(ours, X), np.ones(len(y))
    (_, dual, result), *more = seen
    assert not more
    assert ours.status_ is Status.CONVERGED
    assert violation(dual, result.x, K) <= tol
    r = [margin_scale(m, m.dual_coef_, weight) for m in (ours, theirs)]
    b = [spread(m, len(y)) * s for m, s in zip((ours, theirs), r, strict=True)]
    objective = [dual_value(m, K, y, v) for m, v in zip((ours, theirs), b, strict=True)]
    gap = [objective[k] + best_primal(m, K, y, b[k], weight) for k, m in enumerate((ours, theirs))]
    size = abs(objective[1])
    assert abs(objective[0] - objective[1]) <= 1e-6 * size
    assert ours.dual_objective_ == pytest.approx(objective[0], rel=rounding_of_sums)
    assert ours.duality_gap_ == pytest.approx(gap[0], rel=1e4 * rounding_of_sums, abs=rounding_of_sums * (1 + size))
    intercept = [m.intercept_[0] * s for m, s in zip((ours, theirs), r, strict=True)]
    f = [values_of(m, X) * s for m, s in zip((ours, theirs), r, strict=True)]
    rounding = 1e-9 * (1 + np.abs(f[0]).max()) * max(r)
    reach = np.sqrt(2 * np.diag(K).max()) * sum(np.sqrt(max(0.0, g)) for g in gap)
    bound = reach + abs(intercept[0] - intercept[1]) + rounding
    assert np.abs(f[0] - f[1]).max() <= bound
    if kind not in (SVR, NuSVR):
        assert (ours.predict(X) == theirs.predict(X))[np.abs(f[0]) > bound].all()
    return bound, np.abs(f[0]).max()


@pytest.mark.parametrize("problem", PROBLEMS, ids=label)
def test_equal_to_scikit_learn_on_real_problems(problem, monkeypatch):
    compare_with_peer(problem, problem[2], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("problem", FULL, ids=label)
@pytest.mark.parametrize("parts", [False, True])
def test_equal_to_scikit_learn_on_more_rows(problem, parts, monkeypatch):
    """Also in parts, with certificates from a sample, as problems of tens of thousands of rows are solved."""
    if parts:
        monkeypatch.setattr(dual_module, "PART", 1000)
        monkeypatch.setattr(dual_module, "FEW", 0)
        monkeypatch.setattr(gram_module, "_SMALL_NS", -1.0)
    # float32 entries suffice for tol here, so that the reported sums have their rounding; in parts it adds up over
    # products of many steps (largest seen: 3.7e-7 of the objective)
    compare_with_peer(problem, 5000, monkeypatch, tol=1e-4, rounding_of_sums=5e-7 if parts else 2e-7)


@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if p[1] in ("german_scale", "svmguide1_scale", "diabetes")], ids=label
)
def test_the_default_tolerance_is_kept_in_float64(problem, monkeypatch):
    kind, name, n, parameters = problem
    X, y = subset(*real(name), n)
    seen = solved(monkeypatch)
    machine = fit(kind(**parameters), X.astype(np.float32), y)
    _, dual, result = seen[0]
    assert violation(dual, result.x, kernel_matrix(machine, X.astype(np.float32).astype(float))) <= machine.tol
    assert machine.violation_ <= machine.tol


# Certificates of small problems -------------------------------------------------------------------------------


def small(kind, seed=0, n=60):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3))
    if kind in (SVC, NuSVC):
        return X, np.where(X[:, 0] + 0.7 * rng.normal(size=n) > 0, 1.0, -1.0)
    if kind in (OneClassSVM, SVDD):
        return X + 1, np.zeros(n)  # away from the origin, or a linear one-class problem has no solution but w = 0
    return X, np.sin(2 * X[:, 0]) + 0.1 * rng.normal(size=n)


LIGHT = {
    SVC: {"C": 3},
    NuSVC: {"nu": 0.4},
    SVR: {"C": 3},
    NuSVR: {"C": 3, "nu": 0.4},
    OneClassSVM: {"nu": 0.3},
    SVDD: {"C": 0.1},
}


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-8])
def test_the_gap_is_primal_minus_dual_with_the_best_intercept(kind, tol):
    X, y = small(kind)
    weight = np.random.default_rng(1).uniform(0.5, 2, len(y))
    machine = fit(kind(tol=tol, **LIGHT[kind]), X, y, sample_weight=weight)
    K = kernel_matrix(machine, X)
    b = spread(machine, len(y)) * margin_scale(machine, machine.dual_coef_, weight)
    primal = best_primal(machine, K, y, b, weight)
    assert machine.primal_objective_ == pytest.approx(primal, abs=1e-9 * (1 + abs(primal)))
    assert machine.duality_gap_ == pytest.approx(machine.primal_objective_ + machine.dual_objective_, abs=1e-12)
    assert machine.duality_gap_ >= 0
    exact = fit(kind(tol=1e-12, **LIGHT[kind]), X, y, sample_weight=weight)
    lost = machine.dual_objective_ - exact.dual_objective_
    assert -1e-9 <= lost <= machine.duality_gap_ + 1e-9
    if tol < 1e-6:
        assert machine.duality_gap_ < 1e-5


@pytest.mark.parametrize("kind", MACHINES)
def test_attributes_of_a_fit(kind):
    X, y = small(kind)
    machine = fit(kind(**LIGHT[kind]), X, y)
    assert machine.status_ is Status.CONVERGED
    assert machine.fit_status_ == 0
    assert machine.shape_fit_ == X.shape
    assert machine.n_features_in_ == 3
    assert machine.violation_ <= machine.tol
    assert machine.n_columns_ >= 1
    assert np.ndim(machine.n_iter_) == (1 if kind in (SVC, NuSVC) else 0)
    for name in ("duality_gap_", "violation_", "dual_objective_", "primal_objective_"):
        assert isinstance(getattr(machine, name), float)


# The layout of LIBSVM and scikit-learn ------------------------------------------------------------------------

CONTAINERS = (np.asarray, sp.csr_matrix, sp.csr_array)
TIGHT = 1e-9


def assert_same_model(ours, theirs, rtol=1e-4):
    assert ours.support_.tolist() == theirs.support_.tolist()
    for name in ("support_", "support_vectors_", "n_support_", "dual_coef_", "intercept_"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert sp.issparse(mine) == sp.issparse(other), name
        assert mine.shape == other.shape, name
        assert mine.dtype == other.dtype, name
        mine, other = (v.toarray() if sp.issparse(v) else v for v in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=rtol * (1 + np.abs(other).max(initial=0)))
    assert ours.shape_fit_ == theirs.shape_fit_


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kernel", ["rbf", "linear"])
@pytest.mark.parametrize("kind", [SVC, NuSVC])
def test_layout_of_three_classes(kind, kernel, container):
    X, y = load_iris(return_X_y=True)
    X, y = container(X), np.array(["setosa", "versicolor", "virginica"])[y]
    ours, theirs = (m(kernel=kernel, tol=TIGHT).fit(X, y) for m in (kind, PEERS[kind]))
    if kernel == "rbf" or kind is SVC:  # the linear NuSVC has several solutions
        assert_same_model(ours, theirs, 1e-3)
    assert ours.classes_.tolist() == theirs.classes_.tolist()
    np.testing.assert_allclose(ours.class_weight_, theirs.class_weight_)
    if kernel == "linear":
        mine, other = (v.toarray() if sp.issparse(v) else v for v in (ours.coef_, theirs.coef_))
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3)
    assert len(ours.status_) == len(ours.duality_gap_) == len(ours.n_iter_) == 3


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", FIVE)
def test_layout_of_one_problem(kind, container):
    X, y = small(kind)
    X = container(X)
    ours, theirs = (fit(m(tol=TIGHT, **LIGHT[kind]), X, y) for m in (kind, PEERS[kind]))
    assert_same_model(ours, theirs)
    np.testing.assert_allclose(values_of(ours, X), values_of(theirs, X), atol=1e-4)
    if kind is OneClassSVM:
        np.testing.assert_allclose(ours.offset_, theirs.offset_, rtol=1e-6)
        np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-4)


@pytest.mark.parametrize("kind", FIVE)
@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_of_a_linear_kernel(kind, container):
    X, y = small(kind)
    X = container(X)
    ours = fit(kind(kernel="linear", tol=TIGHT, **LIGHT[kind]), X, y)
    theirs = fit(PEERS[kind](kernel="linear", tol=TIGHT, **LIGHT[kind]), X, y)
    mine, other = (v.toarray() if sp.issparse(v) else v for v in (ours.coef_, theirs.coef_))
    np.testing.assert_allclose(mine, other, atol=1e-4)
    assert not (ours.coef_.data if sp.issparse(ours.coef_) else ours.coef_).flags.writeable
    np.testing.assert_allclose(np.ravel(X @ mine.T) + ours.intercept_, values_of(ours, X), atol=1e-8)


def test_no_weights_of_other_kernels():
    machine = SVC().fit(*small(SVC))
    with pytest.raises(AttributeError, match="only available with kernel='linear'; found kernel='rbf'"):
        _ = machine.coef_
    assert not hasattr(SVC(kernel="linear"), "coef_")


@pytest.mark.parametrize("kind", MACHINES)
def test_not_fitted(kind):
    for method in ("predict", "decision_function"):
        if hasattr(kind, method):
            with pytest.raises(NotFittedError):
                getattr(kind(), method)(np.zeros((2, 2)))


# Kernels ------------------------------------------------------------------------------------------------------

KERNEL_CASES = {
    "linear": {},
    "rbf": {"gamma": 0.3},
    "poly": {"gamma": 0.5, "degree": 2, "coef0": 1.0},
    "sigmoid": {"gamma": 0.01, "coef0": 0.1},
    "laplacian": {"gamma": 0.2},
    "cosine": {},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kernel", KERNEL_CASES)
@pytest.mark.parametrize("kind", FIVE)
def test_every_kernel_against_its_precomputed_matrix(kind, kernel, container):
    X, y = small(kind)
    test = small(kind, seed=5)[0]
    parameters = KERNEL_CASES[kernel]
    K, K_test = (pairwise_kernels(Z, X, metric=kernel, **parameters) for Z in (X, test))
    ours = fit(kind(kernel=kernel, tol=TIGHT, dtype="float64", **parameters, **LIGHT[kind]), container(X), y)
    same = fit(kind(kernel="precomputed", tol=TIGHT, **LIGHT[kind]), K, y)
    peer = fit(PEERS[kind](kernel="precomputed", tol=TIGHT, **LIGHT[kind]), K, y)
    assert same.support_vectors_.shape == (0, 0) == peer.support_vectors_.shape
    assert ours.dual_objective_ == pytest.approx(same.dual_objective_, rel=1e-6)
    reference = values_of(peer, K_test) - peer.intercept_  # intercepts are not unique where no row is free
    np.testing.assert_allclose(values_of(ours, container(test)) - ours.intercept_, reference, atol=1e-3)
    np.testing.assert_allclose(values_of(same, K_test) - same.intercept_, reference, atol=1e-3)


@pytest.mark.parametrize("kind", MACHINES)
def test_a_callable_kernel_of_numbers(kind):
    X, y = small(kind)
    ours = fit(kind(kernel=lambda A, B: np.exp(-0.3 * ((A[:, None] - B) ** 2).sum(2)), tol=TIGHT, **LIGHT[kind]), X, y)
    named = fit(kind(gamma=0.3, tol=TIGHT, **LIGHT[kind]), X, y)
    np.testing.assert_allclose(values_of(ours, X[:7]), values_of(named, X[:7]), atol=1e-5)
    assert ours.support_vectors_.shape == (len(ours.support_), 3)


def test_a_callable_kernel_of_anything():
    """Common letters of words: rows are strings."""
    words = np.array(["abba", "aba", "bab", "xyz", "zyx", "xxyz"])

    def common(A, B):
        return np.array([[len(set(a) & set(b)) for b in B] for a in A], float)

    machine = SVC(kernel=common).fit(words, [0, 0, 0, 1, 1, 1])
    assert machine.predict(["aab", "zz"]).tolist() == [0, 1]
    assert SVC(kernel=common).fit(words.tolist(), [0, 0, 0, 1, 1, 1]).predict(["b"]).tolist() == [0]


def test_a_callable_kernel_of_sparse_rows():
    X, y = small(SVC)
    machine = SVC(kernel=lambda A, B: (A @ B.T).toarray(), tol=TIGHT).fit(sp.csr_array(X), y)
    reference = SVC(kernel="linear", tol=TIGHT).fit(X, y)
    np.testing.assert_allclose(machine.decision_function(sp.csr_array(X)), reference.decision_function(X), atol=1e-5)


@pytest.mark.parametrize("container", CONTAINERS)
def test_gamma_scale_and_auto_are_those_of_scikit_learn(container):
    X, y = small(SVC)
    X = np.where(np.abs(X) < 0.5, 0, X * [1, 10, 100])
    for gamma in ("scale", "auto"):
        ours, theirs = SVC(gamma=gamma).fit(container(X), y), peers.SVC(gamma=gamma).fit(container(X), y)
        assert ours._gamma == pytest.approx(theirs._gamma, rel=1e-12)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_gamma_scale_of_float32_data_with_an_offset():
    """In float32 the variance of these entries would be lost in the mean."""
    X = (1e4 + np.random.default_rng(0).normal(size=(2000, 3))).astype(np.float32)
    assert SVR(max_iter=1).fit(X, X[:, 0])._gamma == pytest.approx(1 / (3 * X.astype(float).var()), rel=1e-6)


# Input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", MACHINES)
def test_data_is_used_in_place_and_keeps_its_dtype(kind, dtype, monkeypatch):
    X, y = small(kind)
    X = X.astype(dtype)
    seen = []
    original = module.Gram

    class Spy(original):
        def __init__(self, X, *args, **kwargs):
            seen.append(X)
            super().__init__(X, *args, **kwargs)

    monkeypatch.setattr(module, "Gram", Spy)
    machine = fit(kind(**LIGHT[kind]), X, y)
    assert seen[0] is X
    assert machine.support_vectors_.dtype == dtype
    assert machine.dual_coef_.dtype == machine.intercept_.dtype == np.float64
    assert values_of(machine, X).dtype == np.float64


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize(
    "convert", [lambda X: X.astype(np.float16), lambda X: X.tolist(), np.asfortranarray, lambda X: X[::-1][::-1]]
)
def test_other_arrays_are_converted(kind, convert):
    X, y = small(kind)
    X = np.round(X, 1).astype(np.float16).astype(float)
    reference = values_of(fit(kind(**LIGHT[kind]), X, y), X)
    np.testing.assert_allclose(values_of(fit(kind(**LIGHT[kind]), convert(X), y), convert(X)), reference, atol=1e-6)


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("form", ["csc", "coo", "wide indices", "unsorted", "duplicates", "integers", "float32"])
def test_every_kind_of_sparse_matrix(kind, form):
    X, y = small(kind)
    X = np.round(X)
    S = sp.csr_array(X)
    if form in ("csc", "coo"):
        S = S.asformat(form)
    elif form == "wide indices":
        S.indices, S.indptr = S.indices.astype(np.int64), S.indptr.astype(np.int64)
    elif form == "unsorted":
        S = sp.csr_array(
            (S.data[::-1].copy(), S.indices[::-1].copy(), np.concatenate([[0], np.cumsum(np.diff(S.indptr)[::-1])])),
            S.shape,
        )
        X, y = X[::-1].copy(), y[::-1].copy()
        assert not S.has_sorted_indices
    elif form == "duplicates":
        S = sp.csr_array((np.repeat(S.data / 2, 2), np.repeat(S.indices, 2), 2 * S.indptr), S.shape)
    elif form == "integers":
        S = S.astype(np.int32)
    else:
        S = S.astype(np.float32)
    before = S.copy()
    reference = fit(kind(tol=TIGHT, **LIGHT[kind]), X, y)
    machine = fit(kind(tol=TIGHT, **LIGHT[kind]), S, y)
    np.testing.assert_allclose(values_of(machine, S), values_of(reference, X), atol=1e-5)
    assert before.nnz == S.nnz
    assert (abs(before - S)).sum() == 0
    assert machine.support_vectors_.dtype == (np.float32 if form == "float32" else np.float64)


@pytest.mark.parametrize("container", [np.asarray, sp.csr_array, sp.csr_matrix])
def test_few_rows_predict_as_many_do(container, monkeypatch):
    X, y = make_blobs_of_three()
    machine = SVC().fit(container(X), y)
    known = machine.decision_function(container(X))
    checked = []
    whole = module.validate_data
    monkeypatch.setattr(module, "validate_data", lambda *a, **k: checked.append(1) or whole(*a, **k))
    for rows in (X[:1], X[:1].astype(np.float32)):
        assert machine.decision_function(container(rows))[0] == pytest.approx(known[0], abs=1e-5)
    assert not checked  # nothing to check that a look did not tell
    for rows in (np.asfortranarray(X[:2]), X[:2].tolist(), np.ma.array(X[:2]), X[::2][:2]):
        np.testing.assert_allclose(machine.decision_function(rows)[0], known[0], atol=1e-12)
    unsorted = sp.csr_array((X[0][::-1], np.arange(X.shape[1])[::-1], [0, X.shape[1]]), shape=(1, X.shape[1]))
    np.testing.assert_allclose(machine.decision_function(unsorted)[0], known[0], atol=1e-12)
    assert len(checked) >= 4


@pytest.mark.parametrize("container", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_single_bad_row_is_refused(container, bad):
    X, y = make_blobs_of_three()
    machine = SVC().fit(X, y)
    row = X[:1].copy()
    row[0, 1] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        machine.predict(container(row))
    for wrong in (X[:1, :1], X[:0], X[0]):
        with pytest.raises(ValueError, match=r"feature|sample|2D"):
            machine.predict(wrong)


def make_blobs_of_three():
    """Three classes in two features, 60 rows."""
    draw = np.random.default_rng(3)
    y = np.arange(60) % 3
    return draw.normal(size=(60, 2)) + 3 * np.array([[0, 0], [1, 0], [0, 1]])[y], y


def test_dense_and_sparse_may_be_mixed_at_prediction():
    X, y = small(SVC)
    for train, test in ((X, sp.csr_array(X)), (sp.csr_array(X), X)):
        machine = SVC().fit(train, y)
        np.testing.assert_allclose(machine.decision_function(test), machine.decision_function(train), atol=1e-6)


def test_wide_sparse_data_is_never_made_dense():
    """Dense, these rows would take 72 GB."""
    rng = np.random.default_rng(0)
    X = sp.random_array((300, 30_000_000), density=1e-6, format="csr", rng=rng)
    y = rng.choice([0, 1, 2], 300)
    machine = SVC(gamma=0.1).fit(X, y)
    assert machine.predict(X).shape == (300,)


def test_float32_and_float64_agree():
    X, y = small(SVC, n=200)
    X = X.astype(np.float32)
    single, double = SVC(tol=1e-6).fit(X, y), SVC(tol=1e-6, dtype="float64").fit(X.astype(float), y)
    np.testing.assert_allclose(single.decision_function(X), double.decision_function(X.astype(float)), atol=1e-4)
    np.testing.assert_allclose(single.decision_function(X.astype(float)), single.decision_function(X), atol=1e-5)


def test_settings_reach_the_gram_and_the_solver(monkeypatch):
    """cache_size in MB, dtype and device; max_iter=-1 is no limit."""
    told = {}
    gram, solve = module.Gram, module.solve_dual

    def make(X, kernel, **settings):
        told.update(settings, kernel=kernel)
        return gram(X, kernel)

    def answer(g, dual, x0=None, **settings):
        told.update(settings, x0=x0)
        return solve(g, dual, x0, **settings)

    monkeypatch.setattr(module, "Gram", make)
    monkeypatch.setattr(module, "solve_dual", answer)
    X, y = small(SVC)
    SVC(cache_size=7, dtype="float64", device="cpu", tol=0.01, shrinking=False).fit(X, y)
    assert (told["cache_size"], told["dtype"], told["device"]) == (7, "float64", "cpu")
    assert (told["tol"], told["max_iter"], told["time_limit"], told["shrinking"]) == (0.01, None, None, False)
    assert told["x0"] is told["callback"] is None
    SVC(max_iter=10**9, time_limit=50).fit(X, y)
    assert (told["max_iter"], told["time_limit"]) == (10**9, 50)


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(kind, bad):
    X, y = small(kind)
    X[3, 1] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        fit(kind(), X, y)
    X[3, 1] = 0
    for weight in (np.full(len(y), bad), np.r_[bad, np.ones(len(y) - 1)]):
        with pytest.raises(ValueError, match=r"sample_weight must be finite; sample_weight\[0\] is"):
            fit(kind(), X, y, sample_weight=weight)
    machine = fit(kind(**LIGHT[kind]), X, y)
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        machine.predict(np.full((1, 3), bad))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"C": 0}, "'C' parameter of SVC must be a float in the range"),
        ({"C": -1.0}, "'C' parameter"),
        ({"tol": 0}, "'tol' parameter"),
        ({"kernel": "gauss"}, "'kernel' parameter of SVC must be a str among"),
        ({"gamma": -1}, "'gamma' parameter"),
        ({"gamma": "best"}, "'gamma' parameter"),
        ({"degree": -1}, "'degree' parameter"),
        ({"cache_size": 0}, "'cache_size' parameter"),
        ({"max_iter": -2}, "'max_iter' parameter"),
        ({"time_limit": -1}, "'time_limit' parameter"),
        ({"dtype": "float16"}, "'dtype' parameter"),
        ({"class_weight": "equal"}, "'class_weight' parameter"),
        ({"class_weight": {1.0: -1}}, "class_weight must not be negative; found"),
        ({"decision_function_shape": "ova"}, "'decision_function_shape' parameter"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        SVC(**parameters).fit(*small(SVC))


@pytest.mark.parametrize(
    ("kind", "parameters"), [(NuSVC, {"nu": 0}), (NuSVR, {"nu": 1.1}), (OneClassSVM, {"nu": 0}), (SVR, {"epsilon": -1})]
)
def test_parameters_of_the_others_out_of_range(kind, parameters):
    with pytest.raises(ValueError, match=f"'{next(iter(parameters))}' parameter of {kind.__name__}"):
        fit(kind(**parameters), *small(kind))


@pytest.mark.parametrize("kind", [SVC, NuSVC])
def test_probability_is_refused_with_code_that_works(kind):
    X, y = small(kind)
    kind(probability=False).fit(X, y)
    with pytest.raises(ValueError, match="probability must be left at its default") as caught:
        kind(probability=True).fit(X, y)
    code = [line.strip() for line in str(caught.value).splitlines()[1:]]
    values = {"X": X, "y": y, kind.__name__: kind}
    exec(code[0], values)
    assert eval(code[1], values).shape == (len(y), 2)
    assert not hasattr(kind(), "predict_proba")


@pytest.mark.parametrize("kind", MACHINES)
def test_precomputed_matrices_must_fit(kind):
    X, y = small(kind)
    with pytest.raises(ValueError, match=r"Precomputed matrix must be a square matrix; found X of shape \(60, 3\)"):
        fit(kind(kernel="precomputed"), X, y)
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        fit(kind(kernel="precomputed"), sp.csr_array(X @ X.T), y)
    machine = fit(kind(kernel="precomputed", **LIGHT[kind]), np.exp(-((X[:, None] - X) ** 2).sum(2)), y)
    with pytest.raises(ValueError, match="60 features"):
        machine.predict(X)


@pytest.mark.parametrize("kind", [SVC, NuSVC])
def test_one_class_is_not_enough(kind):
    X, y = small(kind)
    with pytest.raises(ValueError, match=r"y must hold at least two classes.*1 class \(1.0\)"):
        kind().fit(X, np.ones(len(y)))
    with pytest.raises(ValueError, match="among the rows with positive sample_weight"):
        kind().fit(X, y, sample_weight=y > 0)


def test_infeasible_nu_names_the_largest_feasible_one():
    X, _ = small(NuSVC)
    y = np.repeat(["a", "b"], [45, 15])
    with pytest.raises(ValueError, match=r"the largest feasible nu is 0.5, since classes 'a' and 'b' have") as caught:
        NuSVC(nu=0.51).fit(X, y)
    assert "specified nu is infeasible: nu = 0.51" in str(caught.value)
    NuSVC(nu=0.5).fit(X, y)
    three = np.repeat([0, 1, 2], [30, 20, 10])
    with pytest.raises(ValueError, match=r"the largest feasible nu is 0.5, since classes 0 and 2"):
        NuSVC(nu=0.6).fit(X, three)
    weight = np.where(y == "a", 1.0, 3.0)
    NuSVC(nu=0.99).fit(X, y, sample_weight=weight)
    NuSVC(nu=0.99, class_weight="balanced").fit(X, y)


def test_no_margin_is_an_error_rather_than_a_model_of_noise():
    with pytest.raises(ValueError, match=r"nu = 0.5 leaves no margin"):
        NuSVC(nu=0.5).fit(np.ones((10, 2)), np.repeat([0, 1], 5))


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("form", ["dense", "sparse", "precomputed"])
@pytest.mark.parametrize("unwanted", [0.0, -2.0])
def test_weight_zero_and_less_is_removal(kind, form, unwanted):
    X, y = small(kind)
    weight = np.random.default_rng(2).uniform(0.5, 2, len(y))
    out = np.arange(0, len(y), 4)
    weight[out] = unwanted
    kept = np.setdiff1d(np.arange(len(y)), out)
    parameters = {"tol": TIGHT, **LIGHT[kind]}
    data, left, test = X, X[kept], (X, X)
    if form == "sparse":
        data, left = sp.csr_array(X), sp.csr_array(X[kept])
        test = (data, data)
    elif form == "precomputed":
        parameters["kernel"] = "precomputed"
        data = pairwise_kernels(X, metric="rbf", gamma=0.3)
        left, test = data[np.ix_(kept, kept)].copy(), (data, data[:, kept])
    full = fit(kind(**parameters), data, y, sample_weight=weight)
    part = fit(kind(**parameters), left, y[kept], sample_weight=weight[kept])
    assert full.support_.tolist() == kept[part.support_].tolist()
    assert full.shape_fit_ == data.shape
    np.testing.assert_allclose(
        full.dual_coef_ @ np.ones(len(full.support_)), part.dual_coef_ @ np.ones(len(part.support_)), atol=1e-9
    )
    np.testing.assert_allclose(values_of(full, test[0]), values_of(part, test[1]), atol=1e-7)


def test_a_class_without_weight_is_gone():
    X, y = load_iris(return_X_y=True)
    weight = (y != 1).astype(float)
    machine = SVC().fit(X, y, sample_weight=weight)
    assert machine.classes_.tolist() == [0, 2]
    np.testing.assert_allclose(machine.decision_function(X), SVC().fit(X[y != 1], y[y != 1]).decision_function(X))


@pytest.mark.parametrize("kind", FIVE)
def test_weights_as_in_scikit_learn(kind):
    X, y = small(kind)
    weight = np.random.default_rng(3).uniform(0.2, 3, len(y))
    ours, theirs = (
        fit(m(tol=TIGHT, gamma=0.5, **LIGHT[kind]), X, y, sample_weight=weight) for m in (kind, PEERS[kind])
    )
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("kind", MACHINES)
def test_sample_weight_of_the_wrong_form(kind):
    X, y = small(kind)
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(60,\); found shape \(3,\)"):
        fit(kind(), X, y, sample_weight=[1, 2, 3])
    with pytest.raises(ValueError, match="sample_weight must have a positive entry"):
        fit(kind(), X, y, sample_weight=np.zeros(60))


@pytest.mark.parametrize("class_weight", ["balanced", {0: 2.0, 1: 0.5, 2: 1.0}, {2: 5.0}])
def test_class_weights_as_in_scikit_learn(class_weight):
    X, y = load_iris(return_X_y=True)
    X, y = X[20:], y[20:]
    ours, theirs = (m(class_weight=class_weight, tol=TIGHT, C=0.2).fit(X, y) for m in (SVC, peers.SVC))
    np.testing.assert_allclose(ours.class_weight_, theirs.class_weight_)
    assert_same_model(ours, theirs)


def test_class_weights_move_a_nu_svc():
    X, y = small(NuSVC)
    weighted = NuSVC(nu=0.2, gamma=0.5, class_weight={1.0: 3.0}, tol=TIGHT).fit(X, y)
    same = NuSVC(nu=0.2, gamma=0.5, tol=TIGHT).fit(X, y, sample_weight=np.where(y > 0, 3.0, 1.0))
    np.testing.assert_allclose(weighted.decision_function(X), same.decision_function(X))


# Three and more classes --------------------------------------------------------------------------------------------


def many(n=300, seed=0):
    X, y = load_digits(return_X_y=True)
    return subset(X / 16, y, n)


@pytest.mark.parametrize("kind", [SVC, NuSVC])
@pytest.mark.parametrize("container", [np.asarray, sp.csr_array])
def test_decision_functions_of_ten_classes(kind, container):
    X, y = many()
    test = container(load_digits().data[600:900] / 16)
    parameters = {"nu": 0.1} if kind is NuSVC else {"C": 0.05}
    for shape in ("ovo", "ovr"):
        ours, theirs = (
            m(decision_function_shape=shape, tol=1e-8, **parameters).fit(container(X), y) for m in (kind, PEERS[kind])
        )
        np.testing.assert_allclose(ours.decision_function(test), theirs.decision_function(test), atol=1e-4)
        assert ours.predict(test).tolist() == theirs.predict(test).tolist()
    ours, theirs = (m(break_ties=True, tol=1e-8, **parameters).fit(container(X), y) for m in (kind, PEERS[kind]))
    assert ours.predict(test).tolist() == theirs.predict(test).tolist()


def test_break_ties_matters_and_needs_ovr():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 2)), rng.integers(0, 3, 60)
    test = rng.normal(size=(2000, 2)) * 3
    plain, broken = (SVC(break_ties=b).fit(X, y) for b in (False, True))
    assert (broken.predict(test) == np.argmax(broken.decision_function(test), axis=1)).all()
    assert (plain.predict(test) == peers.SVC().fit(X, y).predict(test)).all()
    assert (plain.predict(test) != broken.predict(test)).any()
    with pytest.raises(ValueError, match="break_ties must be False when decision_function_shape is 'ovo'"):
        broken.set_params(decision_function_shape="ovo").predict(test)


def test_the_pairs_carry_their_own_certificates():
    X, y = many(150)
    machine = SVC(tol=1e-6, C=2).fit(X, y)
    for k, (i, j) in enumerate(combinations(range(10), 2)):
        rows = np.isin(y, (i, j))
        alone = SVC(tol=1e-6, C=2, gamma=machine._gamma).fit(X[rows], y[rows])
        assert machine.dual_objective_[k] == pytest.approx(alone.dual_objective_, rel=1e-6)
        assert machine.violation_[k] <= 1e-6
        assert machine.primal_objective_[k] + machine.dual_objective_[k] == pytest.approx(machine.duality_gap_[k])
        ovo = machine.set_params(decision_function_shape="ovo").decision_function(X[rows])[:, k]
        np.testing.assert_allclose(ovo, -alone.decision_function(X[rows]), atol=1e-4)  # binary: the second is +1
    assert machine.status_ == [Status.CONVERGED] * 45


@pytest.mark.parametrize("form", ["dense", "sparse", "precomputed"])
def test_the_model_does_not_depend_on_n_jobs(form):
    X, y = many(200)
    if form == "sparse":
        X = sp.csr_array(X)
    elif form == "precomputed":
        X = pairwise_kernels(X, metric="rbf")
    one, two, all_ = (
        SVC(n_jobs=j, kernel="precomputed" if form == "precomputed" else "rbf").fit(X, y) for j in (None, 2, -1)
    )
    for other in (two, all_):
        assert one.support_.tolist() == other.support_.tolist()
        np.testing.assert_array_equal(one.intercept_, other.intercept_)
        np.testing.assert_array_equal(one.decision_function(X), other.decision_function(X))


def test_concurrent_pairs_share_the_cache(monkeypatch):
    sizes = []
    original = module.Gram
    monkeypatch.setattr(module, "Gram", lambda X, k, **s: sizes.append(s["cache_size"]) or original(X, k, **s))
    X, y = load_iris(return_X_y=True)
    SVC(n_jobs=2, cache_size=100).fit(X, y)
    SVC(cache_size=100).fit(X, y)
    assert sizes == [50.0] * 3 + [100.0] * 3


@pytest.mark.parametrize("kernel", ["rbf", "precomputed"])
@pytest.mark.parametrize("container", [np.asarray, sp.csr_array])
def test_decisions_do_not_depend_on_how_classes_are_grouped(kernel, container, monkeypatch):
    if kernel == "precomputed" and container is not np.asarray:
        pytest.skip("precomputed matrices are dense")
    X, y = many(150)
    X = pairwise_kernels(X, metric="rbf") if kernel == "precomputed" else container(X)
    machine = SVC(kernel=kernel, decision_function_shape="ovo").fit(X, y)
    whole = machine.decision_function(X)
    for size in (1, 25, 40):  # one, two, four classes at a time
        monkeypatch.setattr(module, "SIDE_BY_SIDE", size)
        np.testing.assert_allclose(machine.decision_function(X), whole, atol=1e-12)


def test_each_kernel_value_is_computed_once(monkeypatch):
    """Ten classes, 45 pairs: n times n_sv entries and no more."""
    entries = []
    original = gram_module._sweep

    def count(team, rows, chunks, use):
        return original(team, rows, chunks, lambda *tile: (entries.append(tile[-1].size), use(*tile)))

    X, y = many(200)
    machine = SVC().fit(X, y)
    monkeypatch.setattr(gram_module, "_sweep", count)
    machine.decision_function(X[:50])
    assert sum(entries) == 50 * len(machine.support_)


# Limits, interruption, warm starts ---------------------------------------------------------------------------------

SLOW = {"C": 1e5, "kernel": "linear"}


def rough(n=400):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 8)) * [1, 1, 1, 1, 10, 10, 100, 100]
    return X, np.where(X[:, 0] + rng.normal(size=n) > 0, 1, -1)


@pytest.mark.parametrize("limit", [{"max_iter": 5}, {"time_limit": 0.0}])
def test_limits_keep_the_best_model_and_say_how_far_it_is(limit):
    X, y = rough()
    with pytest.warns(
        ConvergenceWarning, match=r"SVC: Stopped at .*its violation is .*tol is 0.001.*duality gap .* bounds"
    ) as caught:
        machine = SVC(**SLOW, **limit).fit(X, y)
    assert caught[0].filename == __file__
    assert "warm_start=True" in str(caught[0].message)
    assert machine.fit_status_ == 1
    assert machine.status_ is (Status.ITERATION_LIMIT if "max_iter" in limit else Status.TIME_LIMIT)
    assert machine.violation_ > machine.tol
    assert np.isfinite(machine.duality_gap_)
    assert machine.duality_gap_ > 0
    assert f"{machine.duality_gap_:.3g}" in str(caught[0].message)
    K = X @ X.T
    b = spread(machine, len(y))
    assert machine.duality_gap_ == pytest.approx(
        dual_value(machine, K, y, b) + best_primal(machine, K, y, b, np.ones(len(y))), rel=1e-6
    )
    assert machine.predict(X).shape == y.shape


@pytest.mark.parametrize("kind", MACHINES)
def test_every_machine_is_usable_after_a_limit(kind):
    X, y = small(kind)
    with pytest.warns(ConvergenceWarning, match=kind.__name__):
        machine = fit(kind(max_iter=1, tol=1e-10, kernel="rbf", gamma=5.0, **LIGHT[kind]), X, y)
    assert np.isfinite(values_of(machine, X)).all()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_nu_svc_stopped_before_it_has_a_margin_keeps_a_model(classes, steps, seed):
    """Far from optimal, the two offsets may stand the wrong way round."""
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(90, 2)), np.arange(90) % classes
    with pytest.warns(ConvergenceWarning, match="NuSVC"):
        machine = NuSVC(nu=0.5, max_iter=steps, tol=1e-10, gamma=5.0).fit(X, y)
    assert np.isfinite(machine.decision_function(X)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the overflow
def test_values_too_large_for_a_kernel_are_an_error():
    with pytest.raises(ValueError, match="scale the features"):
        SVC(kernel="linear").fit(np.array([[1e200], [-1e200], [3e200]]), [0, 1, 1])


@pytest.mark.parametrize(("before", "after"), [(0.03, 0.1), (0.1, 0.3), (10.0, 7.0)])
def test_a_warm_start_keeps_zeros_and_bounds(before, after, monkeypatch):
    """Whatever the ratio of the bounds: it costs the columns of the last support vectors and no others."""
    X, y = small(SVC)
    machine = SVC(C=before, warm_start=True).fit(X, y)
    support, at_bound = machine.support_, np.abs(machine.dual_coef_[0]) == before
    first = []
    original = module.solve_dual
    monkeypatch.setattr(module, "solve_dual", lambda g, d, x0, **kw: (first.append(x0), original(g, d, x0, **kw))[1])
    machine.set_params(C=after).fit(X, y)
    assert np.flatnonzero(first[0]).tolist() == sorted(support.tolist())
    assert (np.abs(first[0][support[at_bound]]) == after).all()


def test_time_limit_of_many_pairs_is_shared():
    X, y = many(300)
    with pytest.warns(ConvergenceWarning, match=r"SVC: \d+ of 45 pairs of classes, the worst of them"):
        machine = SVC(time_limit=1e-9).fit(X, y)
    assert Status.TIME_LIMIT in machine.status_
    assert machine.predict(X).shape == y.shape
    started = time.perf_counter()
    SVC(time_limit=60).fit(X, y)
    assert time.perf_counter() - started < 30


def interrupted(monkeypatch, after):
    """From this solve on, Ctrl-C comes while solving."""
    original, calls = module.solve_dual, []

    def answer(gram, dual, x0=None, **settings):
        calls.append(settings)
        result = original(gram, dual, x0, **(settings | ({"max_iter": 3} if len(calls) >= after else {})))
        return module.replace(result, status=Status.INTERRUPTED) if len(calls) == after else result

    monkeypatch.setattr(module, "solve_dual", answer)
    return calls


@pytest.mark.parametrize("kind", MACHINES)
def test_ctrl_c_keeps_the_model(kind, monkeypatch):
    X, y = small(kind)
    interrupted(monkeypatch, 1)
    with pytest.warns(ConvergenceWarning, match="Interrupted.*duality gap"):
        machine = fit(kind(**LIGHT[kind]), X, y)
    assert machine.status_ is Status.INTERRUPTED
    assert machine.predict(X).shape == y.shape


def test_ctrl_c_among_pairs_leaves_the_rest_at_the_start(monkeypatch):
    X, y = many(200)
    calls = interrupted(monkeypatch, 4)
    with pytest.warns(ConvergenceWarning, match="42 of 45 pairs of classes.*Interrupted"):
        machine = SVC().fit(X, y)
    assert machine.status_ == [Status.CONVERGED] * 3 + [Status.INTERRUPTED] * 42
    assert [c["max_iter"] for c in calls] == [None] * 4 + [0] * 41
    assert np.isfinite(machine.duality_gap_).all()
    assert machine.predict(X).shape == y.shape


def test_ctrl_c_between_solves_of_concurrent_pairs(monkeypatch):
    X, y = many(200)

    class Broken(module.Parallel):
        """Ctrl-C reaches the thread that waits, after two answers."""

        def __call__(self, jobs):
            self.answers, self.given = super().__call__(jobs), 0
            return self

        def __iter__(self):
            return self

        def __next__(self):
            self.given += 1
            if self.given > 2:
                raise KeyboardInterrupt
            return next(self.answers)

        def close(self):
            self.answers.close()

    monkeypatch.setattr(module, "Parallel", Broken)
    with pytest.warns(ConvergenceWarning, match="43 of 45 pairs"):
        machine = SVC(n_jobs=2).fit(X, y)
    assert machine.status_[:2] == [Status.CONVERGED] * 2


@pytest.mark.parametrize("kind", MACHINES)
def test_warm_start_goes_on_from_the_last_solution(kind):
    X, y = small(kind, n=150)
    machine = fit(kind(tol=1e-6, warm_start=True, **LIGHT[kind]), X, y)
    first = np.max(machine.n_iter_)
    fit(machine, X, y)
    assert np.max(machine.n_iter_) <= max(3, first // 10)
    cold = fit(kind(tol=1e-6, **LIGHT[kind]), X, y)
    assert machine.dual_objective_ == pytest.approx(cold.dual_objective_, rel=1e-6)
    fit(machine, X[:-5], y[:-5])  # another number of rows: from the beginning
    assert machine.status_ is Status.CONVERGED


def test_a_path_of_c_is_shorter_warm():
    X, y = small(SVC, n=400)
    path = 2.0 ** np.arange(-2, 7)
    cold = [SVC(C=C).fit(X, y) for C in path]
    machine, steps = SVC(warm_start=True), 0
    for C, reference in zip(path, cold, strict=True):
        machine.set_params(C=C).fit(X, y)
        steps += machine.n_iter_[0]
        assert machine.status_ is Status.CONVERGED
        assert abs(machine.dual_objective_ - reference.dual_objective_) <= max(
            machine.duality_gap_, reference.duality_gap_
        )
    assert steps < sum(m.n_iter_[0] for m in cold)


def test_warm_start_of_pairs():
    X, y = many(200)
    machine = SVC(warm_start=True, tol=1e-5).fit(X, y)
    first = machine.n_iter_.sum()
    machine.fit(X, y)
    assert machine.n_iter_.sum() < first / 10


def test_no_solution_is_kept_without_warm_start():
    assert not hasattr(SVC().fit(*small(SVC)), "_last_duals")


def test_verbose_prints_a_line_a_second(monkeypatch, capsys):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    X, y = rough(200)
    with pytest.warns(ConvergenceWarning):
        SVC(verbose=True, max_iter=20_000, kernel="linear", C=1e5, tol=1e-9).fit(X, y)
    assert "SVC: " in capsys.readouterr().out
    SVC().fit(*small(SVC))
    assert capsys.readouterr().out == ""


# Callbacks of scikit-learn ------------------------------------------------------------------------------------------

callback = pytest.importorskip("sklearn.callback", reason="scikit-learn before 1.9 has no callbacks")


class Recorder:
    """Counts the hooks; stops after some looks; may ask for the fitted machine."""

    def __init__(self, stop_after=None, X=None, raises=None):
        self.stop_after, self.X, self.raises = stop_after, X, raises
        self.events, self.values = [], []

    def setup(self, estimator, context):
        self.events.append("setup")

    def teardown(self, estimator, context):
        self.events.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.events.append(("begin", context.task_name))

    def on_fit_task_end(self, estimator, context, *, fitted_estimator):
        self.events.append(("end", context.task_name))
        if self.X is not None and fitted_estimator is not None:
            self.values.append(values_of(fitted_estimator, self.X))
        ended = sum(event[0] == "end" for event in self.events)
        if self.raises and ended == self.raises:
            signal.raise_signal(signal.SIGINT)
        return self.stop_after is not None and ended >= self.stop_after


def test_callbacks_see_the_looks_of_the_solver():
    X, y = rough(300)
    recorder = Recorder(X=X[:5])
    machine = SVC(C=10, tol=1e-8).set_callbacks(recorder).fit(X, y)
    assert recorder.events[:2] == ["setup", ("begin", "fit")]
    assert recorder.events[-2:] == [("end", "fit"), "teardown"]
    looks = recorder.events[2:-2]
    assert looks
    assert looks[0::2] == [("begin", "solver look")] * (len(looks) // 2)
    assert looks[1::2] == [("end", "solver look")] * (len(looks) // 2)
    np.testing.assert_array_equal(recorder.values[-1], machine.decision_function(X[:5]))


@pytest.mark.parametrize("kind", MACHINES)
def test_the_machine_a_callback_gets_is_that_of_the_last_step(kind):
    """A run that the callback stops: what it saw last, against the machine that fit returns."""
    X, y = small(kind)
    recorder = Recorder(stop_after=3, X=X)
    machine = fit(kind(gamma=3.0, tol=1e-9, **LIGHT[kind]).set_callbacks(recorder), X, y)
    assert machine.status_ is Status.CALLBACK
    assert machine.fit_status_ == 1
    np.testing.assert_allclose(recorder.values[-2], recorder.values[-1], atol=1e-5)


def test_a_callback_may_stop_the_pairs():
    X, y = many(200)
    recorder = Recorder(stop_after=3)
    machine = SVC().set_callbacks(recorder).fit(X, y)
    assert machine.status_ == [Status.CONVERGED] * 3 + [Status.CALLBACK] * 42
    assert recorder.events.count(("begin", "pair of classes")) == 3
    assert recorder.events[-1] == "teardown"


def test_ctrl_c_in_earnest():
    """SIGINT while the solver runs; the fit returns."""
    X, y = rough(300)
    recorder = Recorder(raises=2)
    with pytest.warns(ConvergenceWarning, match="Interrupted"):
        machine = SVC(**SLOW, tol=1e-9).set_callbacks(recorder).fit(X, y)
    assert machine.status_ is Status.INTERRUPTED
    assert machine.predict(X).shape == y.shape


def test_scoring_monitor():
    X, y = small(SVC)
    monitor = callback.ScoringMonitor(scoring="accuracy")
    y = np.where(y > 0, "yes", "no")
    machine = SVC(gamma=3.0, tol=1e-8).set_callbacks(monitor).fit(X, y)
    scores = [entry["accuracy"] for entry in monitor.get_logs().data]
    assert len(scores) > 2
    assert max(scores) == scores[-1] == machine.score(X, y) > 0.9


# Degenerate fits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [np.asarray, sp.csr_array])
def test_a_regression_without_support_vectors(container):
    X = container(np.arange(6.0)[:, None])
    for kind in (SVR, NuSVR):
        machine = kind().fit(X, np.full(6, 2.5))
        np.testing.assert_allclose(machine.predict(X), 2.5)
    machine = SVR(kernel="linear").fit(X, np.full(6, 2.5))
    assert len(machine.support_) == 0
    assert machine.dual_coef_.shape == (1, 0)
    assert machine.coef_.shape == (1, 1)
    assert machine.support_vectors_.shape == (0, 1)


@pytest.mark.parametrize("kind", [SVR, NuSVR, OneClassSVM, SVDD])
def test_one_row(kind):
    X, y = np.array([[1.0, 2.0]]), np.array([3.0])
    machine = fit(kind(), X, y)
    assert machine.status_ is Status.CONVERGED
    if kind in (SVR, NuSVR):
        np.testing.assert_allclose(machine.predict([[7.0, 7.0]]), 3.0)
    else:
        np.testing.assert_allclose(machine.decision_function(X), 0, atol=1e-12)


# SVDD ---------------------------------------------------------------------------------------------------------------


def test_svdd_with_an_rbf_kernel_is_one_class():
    X, _ = small(SVDD)
    nu = 0.3
    ball = SVDD(C=1 / (nu * len(X)), tol=1e-11).fit(X)
    plane = OneClassSVM(nu=nu, tol=1e-10).fit(X)
    np.testing.assert_allclose(ball.decision_function(X) * nu * len(X) / 2, plane.decision_function(X), atol=1e-6)
    np.testing.assert_allclose(ball.dual_coef_ * nu * len(X), plane.dual_coef_, atol=1e-5)


def test_svdd_is_the_smallest_enclosing_ball():
    """Linear kernel: distances in the plane; the ball through an equilateral triangle."""
    angle = 2 * np.pi * np.arange(3) / 3
    X = np.vstack([np.column_stack([np.cos(angle), np.sin(angle)]) * 2 + 5, [[5.0, 5.5]]])
    machine = SVDD(kernel="linear", tol=1e-10).fit(X)
    assert machine.radius_ == pytest.approx(2)
    np.testing.assert_allclose(machine.dual_coef_ @ machine.support_vectors_, [[5, 5]], atol=1e-6)
    test = np.array([[5, 6.9], [5, 7.1], [9, 5]])
    np.testing.assert_allclose(machine.decision_function(test), 4 - ((test - 5) ** 2).sum(1), atol=1e-5)
    np.testing.assert_allclose(machine.score_samples(test), -((test - 5) ** 2).sum(1), atol=1e-5)
    assert machine.predict(test).tolist() == [1, -1, -1]
    np.testing.assert_allclose(machine.offset_, -4)


@pytest.mark.parametrize("kernel", KERNEL_CASES)
def test_svdd_measures_distances_in_feature_space(kernel):
    X, test = small(SVDD)[0], np.vstack([small(SVDD, 5)[0], np.zeros((1, 3))])
    machine = SVDD(kernel=kernel, C=0.1, tol=1e-9, **KERNEL_CASES[kernel]).fit(X)
    K, cross, own = (
        pairwise_kernels(A, B, metric=kernel, **KERNEL_CASES[kernel]) for A, B in ((X, X), (test, X), (test, test))
    )
    a = spread(machine, len(X))
    distance = np.diag(own) - 2 * cross @ a + a @ K @ a
    np.testing.assert_allclose(machine.decision_function(test), machine.radius_**2 - distance, atol=1e-5)


def test_svdd_errors():
    X, _ = small(SVDD)
    with pytest.raises(ValueError, match=r"C = 0.01 is infeasible: the smallest feasible C is 0.0166667"):
        SVDD(C=0.01).fit(X)
    with pytest.raises(ValueError, match=r"constant diagonal for SVDD.*pass the kernel as a function"):
        SVDD(kernel="precomputed").fit(X @ X.T)
    K = 3 * pairwise_kernels(X, metric="rbf")
    machine, named = (
        SVDD(kernel="precomputed", C=0.1).fit(K),
        SVDD(C=0.1, kernel=lambda A, B: 3 * pairwise_kernels(A, B, "rbf")).fit(X),
    )
    np.testing.assert_allclose(machine.decision_function(K), named.decision_function(X), atol=1e-3)
