"""What must not change a machine, for any data: order, names of classes, repetition against weight, shifts, units."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from bcd.svm import SVC, SVDD, SVR, NuSVC, NuSVR, OneClassSVM

MACHINES = (SVC, NuSVC, SVR, NuSVR, OneClassSVM, SVDD)
LIGHT = {
    SVC: {"C": 2},
    NuSVC: {"nu": 0.2},
    SVR: {"C": 2},
    NuSVR: {"C": 2, "nu": 0.4},
    OneClassSVM: {"nu": 0.4},
    SVDD: {"C": 1 / 4},
}
TOL = 1e-8
few = settings(max_examples=25)


@st.composite
def problems(draw, classes=2):
    """X, y, and a generator. Rows may coincide, also with other labels; the classes are of nearly the same size."""
    n, d = draw(st.integers(8, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    X = rng.normal(size=(n, d))
    if draw(st.booleans()):
        X = np.round(X)
    y = rng.permutation(np.arange(n) % classes)
    return X, y, rng


def machine(kind, **parameters):
    return kind(tol=TOL, gamma=0.7, **(LIGHT[kind] | parameters))


def posed(kind, X, y):
    """Data that suit a machine: classes or numbers; a NuSVC needs classes that some margin separates."""
    if kind is NuSVC:
        X = np.column_stack([X, y - 0.5])
    return X, y if kind in (SVC, NuSVC) else X[:, 0] + y


def values(m, X):
    return m.decision_function(X) if hasattr(m, "decision_function") else m.predict(X)


def reach(m):
    """What a decision value can be off by: the gap bounds |w - w*|; a NuSVC was divided by rho; SVDD counts twice."""
    per_unit = 2.0 if isinstance(m, SVDD) else 1.0
    if isinstance(m, NuSVC):
        per_unit = np.abs(m.dual_coef_).sum() / (m.nu * m.shape_fit_[0])
    return per_unit * np.sqrt(2 * max(0.0, m.duality_gap_))


def assert_same(a, b, values_a, values_b, scale=1.0):
    """Equal objectives to the gaps, equal functions up to a shift of the intercept (which need not be unique)."""
    assert abs(a.dual_objective_ * scale - b.dual_objective_) <= a.duality_gap_ * scale + b.duality_gap_ + 1e-9
    shift = values_a - values_b
    bound = 2 * (reach(a) + reach(b)) + 1e-6 * (1 + np.abs(values_a).max())
    assert np.ptp(shift) <= bound


@pytest.mark.parametrize("kind", MACHINES)
@given(drawn=problems())
@few
def test_the_order_of_the_rows(kind, drawn):
    X, y, rng = drawn
    X, y = posed(kind, X, y)
    order = rng.permutation(len(y))
    a, b = machine(kind).fit(X, y), machine(kind).fit(X[order], y[order])
    assert_same(a, b, values(a, X), values(b, X))


@pytest.mark.parametrize("kind", [SVC, NuSVC])
@given(drawn=problems())
@few
def test_flipped_labels_flip_the_function(kind, drawn):
    X, y, _ = drawn
    X, y = posed(kind, X, y)
    a, b = machine(kind).fit(X, y), machine(kind).fit(X, 1 - y)
    assert_same(a, b, values(a, X), -values(b, X))


@pytest.mark.parametrize("kind", [SVR, NuSVR])
@given(drawn=problems())
@few
def test_flipped_targets_flip_the_function(kind, drawn):
    X, y, _ = drawn
    X, y = posed(kind, X, y)
    a, b = machine(kind).fit(X, y), machine(kind).fit(X, -y)
    assert_same(a, b, values(a, X), -values(b, X))


@given(drawn=problems(classes=3))
@few
def test_names_of_classes_do_not_matter(drawn):
    X, y, _ = drawn
    names = np.array(["a", "b", "c"])
    a, b = machine(SVC).fit(X, y), machine(SVC).fit(X, names[y])
    np.testing.assert_array_equal(a.decision_function(X), b.decision_function(X))
    np.testing.assert_array_equal(names[a.predict(X)], b.predict(X))


@pytest.mark.parametrize("kind", MACHINES)
@given(drawn=problems())
@few
def test_repeated_rows_are_weights(kind, drawn):
    X, y, rng = drawn
    X, y = posed(kind, X, y)
    count = rng.integers(1, 4, len(y))
    if kind not in (SVR, NuSVR, OneClassSVM, SVDD):
        count[np.unique(y, return_index=True)[1]] += 1
    gone = rng.random(len(y)) < 0.2
    gone[:4] = False
    count[gone] = 0
    if kind in (SVC, NuSVC) and len(np.unique(y[count > 0])) < 2:
        count[:] = 1
    if kind is NuSVC:  # feasible for both classes
        by_class = np.bincount(y, count)
        if 2 * by_class.min() / by_class.sum() < LIGHT[NuSVC]["nu"]:
            count[:] = 1
    a = machine(kind).fit(X, y, sample_weight=count)
    b = machine(kind).fit(np.repeat(X, count, axis=0), np.repeat(y, count))
    assert_same(a, b, values(a, X), values(b, X))


@pytest.mark.parametrize("kind", MACHINES)
@given(drawn=problems(), distance=st.sampled_from([-3.0, 1.0, 100.0]))
@few
def test_an_rbf_kernel_does_not_see_a_shift(kind, drawn, distance):
    X, y, rng = drawn
    X, y = posed(kind, X, y)
    by = distance * rng.normal(size=X.shape[1])
    a, b = machine(kind).fit(X, y), machine(kind).fit(X + by, y)
    assert_same(a, b, values(a, X), values(b, X + by))


@pytest.mark.parametrize("kind", [SVC, SVR, NuSVR])
@given(drawn=problems(), factor=st.sampled_from([0.1, 3.0, 50.0]))
@few
def test_c_and_the_weights_are_one_product(kind, drawn, factor):
    """C -> C t with weights w -> w / t, and for classes by class_weight."""
    X, y, rng = drawn
    X, y = posed(kind, X, y)
    weight = rng.uniform(0.5, 2, len(y))
    C = LIGHT[kind]["C"]
    a = machine(kind).fit(X, y, sample_weight=weight)
    b = machine(kind, C=C * factor).fit(X, y, sample_weight=weight / factor)
    assert_same(a, b, values(a, X), values(b, X))
    if kind is SVC:
        c = machine(SVC, C=C * factor, class_weight=dict.fromkeys((0, 1), 1 / factor)).fit(X, y, sample_weight=weight)
        assert_same(a, c, values(a, X), values(c, X))


@pytest.mark.parametrize("kind", [SVC, NuSVC])
@given(drawn=problems(), factor=st.sampled_from([0.5, 2.0]))
@few
def test_class_weight_is_the_weight_of_the_rows(kind, drawn, factor):
    X, y, _ = drawn
    X, y = posed(kind, X, y)
    a = machine(kind, class_weight={1: factor}).fit(X, y)
    b = machine(kind).fit(X, y, sample_weight=np.where(y == 1, factor, 1.0))
    assert_same(a, b, values(a, X), values(b, X))


@pytest.mark.parametrize("kind", [OneClassSVM, NuSVC])
@given(drawn=problems())
@few
def test_the_unit_of_the_weights_does_not_matter_to_nu(kind, drawn):
    """w -> 3 w: b -> 3 b (before a NuSVC divides by rho, which is 3 times as large)."""
    X, y, _ = drawn
    X, y = posed(kind, X, y)
    a, b = machine(kind).fit(X, y), machine(kind).fit(X, y, sample_weight=np.full(len(y), 3.0))
    times = 3.0 if kind is OneClassSVM else 1.0
    assert b.dual_objective_ == pytest.approx(9 * a.dual_objective_, abs=9 * a.duality_gap_ + b.duality_gap_ + 1e-9)
    assert np.ptp(times * values(a, X) - values(b, X)) <= 6 * (times * reach(a) + reach(b)) + 1e-6


@pytest.mark.parametrize("kind", [SVC, SVR])
@given(drawn=problems(), scale=st.sampled_from([0.25, 8.0]))
@few
def test_the_unit_of_a_linear_kernel(kind, drawn, scale):
    """X -> t X with C -> C / t^2: w -> w / t, and the function stays."""
    X, y, _ = drawn
    X, y = posed(kind, X, y)
    a = machine(kind, kernel="linear").fit(X, y)
    b = machine(kind, kernel="linear", C=LIGHT[kind]["C"] / scale**2).fit(scale * X, y)
    slack = a.duality_gap_ + scale**2 * b.duality_gap_ + 1e-9
    assert b.dual_objective_ * scale**2 == pytest.approx(a.dual_objective_, abs=slack)
    np.testing.assert_allclose(b.coef_ * scale, a.coef_, atol=2 * (reach(a) + scale * reach(b)) + 1e-6)


@pytest.mark.parametrize("kind", MACHINES)
@given(drawn=problems(), kernel=st.sampled_from(["rbf", "linear", "poly", "laplacian", "cosine"]))
@few
def test_sparse_rows_are_dense_rows(kind, drawn, kernel):
    X, y, rng = drawn
    X = np.where(rng.random(X.shape) < 0.4, 0.0, X)
    X, y = posed(kind, X, y)
    if kind is OneClassSVM and kernel != "rbf":
        kernel = "laplacian"  # with the others w = 0 may be the solution
    a, b = (machine(kind, kernel=kernel).fit(Z, y) for Z in (X, sp.csr_array(X)))
    assert_same(a, b, values(a, X), values(b, sp.csr_array(X)))


@pytest.mark.parametrize("kind", MACHINES)
@given(drawn=problems())
@few
def test_dual_points_are_feasible_and_certified(kind, drawn):
    X, y, rng = drawn
    X, y = posed(kind, X, y)
    weight = rng.uniform(0.5, 2, len(y)) if kind is not NuSVC else np.ones(len(y))
    m = machine(kind).fit(X, y, sample_weight=weight)
    assert m.violation_ <= TOL
    assert 0 <= m.duality_gap_ <= TOL * (1 + 4 * weight.sum() * LIGHT[kind].get("C", 1))
    b = np.zeros(len(y))
    b[m.support_] = m.dual_coef_[0]
    if kind in (SVC, SVR, NuSVR):
        assert (np.abs(b) <= LIGHT[kind]["C"] * weight * (1 + 1e-12)).all()
    if kind in (SVC, NuSVC, SVR, NuSVR):
        assert abs(b.sum()) <= 1e-9 * (1 + np.abs(b).sum())
    else:
        assert b.sum() == pytest.approx(1 if kind is SVDD else LIGHT[kind]["nu"] * weight.sum())
    if kind in (SVC, NuSVC):
        assert (b[y == 1] >= 0).all()
        assert (b[y == 0] <= 0).all()


@given(drawn=problems())
@few
def test_nu_bounds_the_shares_of_outliers_and_of_support_vectors(drawn):
    X, _, _ = drawn
    m = machine(OneClassSVM).fit(X)
    n, nu = len(X), LIGHT[OneClassSVM]["nu"]
    assert (m.decision_function(X) < -1e-6).sum() <= nu * n + 1e-9
    assert len(m.support_) >= nu * n - 1e-9
