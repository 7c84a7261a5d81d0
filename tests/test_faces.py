# SPDX-License-Identifier: BSD-3-Clause
"""Solves on the free coordinates: every form of P against numpy.linalg.solve of the bordered system."""

from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator

from bcd import LowRank, NonConvexError, faces
from bcd.faces import make_face
from bcd.objectives import DenseHessian, OperatorHessian, SparseHessian

EPS = np.finfo(np.float64).eps
FORMS = ("dense", "sparse", "low rank", "sparse factors", "operator")
DIRECT = FORMS[:-1]


def definite(rng, n, rank=None, least=0.2):
    """F, D and F F' + diag(D)."""
    F = rng.standard_normal((n, rank or n)) / np.sqrt(rank or n)
    D = rng.uniform(least, 1, n)
    return F, D, F @ F.T + np.diag(D)


def hessian(form, F, D):
    P = F @ F.T + np.diag(D)
    return {
        "dense": lambda: DenseHessian(P),
        "sparse": lambda: SparseHessian(sp.csc_array(P)),
        "low rank": lambda: LowRank(F, D),
        "sparse factors": lambda: LowRank(sp.csr_array(F), D),
        "operator": lambda: OperatorHessian(aslinearoperator(P)),
    }[form]()


def draw_system(rng, n, groups):
    """Free coordinates, a right-hand side, the sum of each (-1: none; no sum is empty), and what the sums lack."""
    F = np.sort(rng.permutation(n)[: rng.integers(max(groups, 1), n + 1)])
    sums = rng.integers(-1, groups, len(F)) if groups > 1 else np.full(len(F), groups - 1)
    sums[rng.permutation(len(F))[:groups]] = np.arange(groups)
    return F, rng.standard_normal(len(F)), sums, rng.standard_normal(groups)


def bordered(P, F, h, sums, off, damping):
    """(d, y) from the whole system."""
    f, m = len(F), len(off)
    E = (sums[:, None] == np.arange(m)).astype(float)
    K = P[np.ix_(F, F)] + np.diag(np.zeros(f) if damping is None else damping)
    both = np.linalg.solve(np.block([[K, E], [E.T, np.zeros((m, m))]]), np.concatenate([h, off]))
    return both[:f], both[f:]


def assert_solved(P, system, found, rtol=1e-9):
    F, h, sums, off, damping = system
    d, y = bordered(P, F, h, sums, off, damping)
    np.testing.assert_allclose(found[0], d, rtol=rtol, atol=rtol * (1 + np.abs(d).max()))
    np.testing.assert_allclose(found[1], y, rtol=rtol, atol=rtol * (1 + np.abs(y).max(initial=0)))


# -- every form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(0, 3), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_bordered_system_is_solved(form, n, groups, damped, seed):
    """Ranks below and above the number of free coordinates: the low-rank face has two ways."""
    rng = np.random.default_rng(seed)
    F, D, P = definite(rng, n, int(rng.integers(1, n + 1)))
    system = draw_system(rng, n, min(groups, n))
    damping = rng.uniform(0.01, 10, len(system[0])) if damped else None
    found = make_face(hessian(form, F, D)).kkt(*system, damping)
    coarse = form == "dense" and damped  # in float32
    assert_solved(P, (*system, damping), found, 1e-3 if coarse else 1e-7 if form == "operator" else 1e-9)


def test_light_damping_is_solved_for_in_float64():
    """Float32 serves well damped steps only: with less its rounding would be worth more than the step."""
    rng = np.random.default_rng(3)
    F, D, P = definite(rng, 40)
    system = draw_system(rng, 40, 2)
    damping = 1e-6 * P.diagonal()[system[0]]
    assert_solved(P, (*system, damping), make_face(hessian("dense", F, D)).kkt(*system, damping), 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_more_than_many_sums_are_solved_by_conjugate_gradients(form, monkeypatch):
    monkeypatch.setattr(faces, "MOST_ENTRIES", 10)
    rng = np.random.default_rng(0)
    F, D, P = definite(rng, 25, 4)
    system = draw_system(rng, 25, 3)
    assert_solved(P, (*system, None), make_face(hessian(form, F, D)).kkt(*system, None), 1e-7)


@pytest.mark.parametrize("form", DIRECT)
def test_badly_scaled(form):
    """Each equation holds to the rounding of its own terms."""
    rng = np.random.default_rng(1)
    F, D, _ = definite(rng, 20, 5)
    scale = 10.0 ** rng.uniform(-2, 2, 20)
    F, D = scale[:, None] * F, scale**2 * D
    P = F @ F.T + np.diag(D)
    free, h, sums, off = draw_system(rng, 20, 2)
    d, y = make_face(hessian(form, F, D)).kkt(free, h, sums, off, None)
    E = (sums[:, None] == np.arange(2)).astype(float)
    K = P[np.ix_(free, free)]
    terms = np.abs(K) @ np.abs(d) + E @ np.abs(y) + np.abs(h)
    assert (np.abs(K @ d + E @ y - h) <= 1e-8 * terms).all()
    np.testing.assert_allclose(E.T @ d, off, atol=1e-8 * (1 + np.abs(d).sum()))


# -- a dense factor that is kept -----------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(20, 60), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_kept_factor_serves_through_many_changes(n, groups, seed):
    """A walk of free sets, a few coordinates in and out at a time, with damped solves between."""
    rng = np.random.default_rng(seed)
    _, _, P = definite(rng, n)
    face = make_face(DenseHessian(P))
    labels = rng.integers(-1, groups, n) if groups else np.full(n, -1)
    labels[:groups] = np.arange(groups)
    free, solves = rng.random(n) < 0.7, 0
    free[:groups] = True
    with mock.patch.object(faces, "_cholesky", wraps=faces._cholesky) as factored:
        for step in range(30):
            flips = rng.permutation(np.arange(groups, n))[: rng.integers(0, 3)]
            free[flips] = ~free[flips]
            F = np.flatnonzero(free)
            if len(F) == 0:
                continue
            h, off = rng.standard_normal(len(F)), rng.standard_normal(groups)
            damping = rng.uniform(0.1, 1, len(F)) if step % 7 == 3 else None
            solves += damping is None
            system = (F, h, labels[F], off, damping)
            assert_solved(P, system, face.kkt(*system), 1e-8 if damping is None else 1e-3)
        fresh = sum(call.args[1] is None for call in factored.call_args_list)
    assert 1 <= fresh < 0.9 * solves


def test_a_coordinate_may_change_its_sum():
    """A free slack takes its sum out of the system: the kept factor must not remember it."""
    rng = np.random.default_rng(9)
    _, _, P = definite(rng, 40)
    face, F = make_face(DenseHessian(P)), np.arange(40)
    for labels in (F % 2, np.where(F % 2, 0, -1), np.full(40, -1), F % 2, F % 3):
        system = (F, rng.standard_normal(40), labels, rng.standard_normal(labels.max() + 1), None)
        assert_solved(P, system, face.kkt(*system))


def test_the_factor_is_kept_while_changes_are_few_and_renewed_then():
    rng = np.random.default_rng(2)
    _, _, P = definite(rng, 80)
    face = make_face(DenseHessian(P))
    sets = [
        np.arange(60),
        np.arange(60),
        np.arange(2, 65),
        np.append(np.arange(5, 60), 70),
        np.arange(30, 80),
        np.arange(31, 80),
    ]
    new = []
    for F in sets:
        h = rng.standard_normal(len(F))
        with mock.patch.object(faces, "_cholesky", wraps=faces._cholesky) as factored:
            d, _ = face.kkt(F, h, np.full(len(F), -1), np.zeros(0), None)
        new.append(factored.call_count)
        np.testing.assert_allclose(d, np.linalg.solve(P[np.ix_(F, F)], h), rtol=1e-9, atol=1e-10)
    assert new == [1, 0, 0, 0, 1, 0]


def test_rows_that_repeat_rows_of_the_base_do_not_break_the_border():
    """The Schur complement is singular: rounding decides its sign."""
    rng = np.random.default_rng(3)
    F, _, _ = definite(rng, 40)
    F = np.concatenate([F, F[:4]])
    P = F @ F.T
    face = make_face(DenseHessian(P))
    face.kkt(np.arange(40), np.ones(40), np.full(40, 0), np.zeros(1), None)
    free = np.arange(44)
    h = P @ rng.standard_normal(44)
    d, y = face.kkt(free, h, np.full(44, 0), np.zeros(1), None)
    assert abs(d.sum()) <= 1e-9 * np.abs(d).sum()
    np.testing.assert_allclose(P @ d + y, h, atol=1e-7 * np.abs(h).max())


# -- not positive definite -----------------------------------------------------------------------


def dented(rng, n, depth):
    """Positive definite where a sum is kept, of curvature -depth n or so along the ones."""
    _, _, P = definite(rng, n)
    return P - depth * np.ones((n, n))


INDEFINITE = {
    "dense": lambda P: DenseHessian(P),
    "sparse": lambda P: SparseHessian(sp.csc_array(P)),
    "operator": lambda P: OperatorHessian(aslinearoperator(P)),
}


@pytest.mark.parametrize("form", INDEFINITE)
@settings(max_examples=40)
@given(st.integers(2, 25), st.floats(0.5, 50), st.integers(0, 2**32 - 1))
def test_convex_where_the_sum_is_kept_is_enough(form, n, depth, seed):
    rng = np.random.default_rng(seed)
    P = dented(rng, n, depth)
    F, h, sums, off = draw_system(rng, n, 1)
    found = make_face(INDEFINITE[form](P)).kkt(F, h, sums, off, None)
    assert_solved(P, (F, h, sums, off, None), found, 1e-7)


@pytest.mark.parametrize("form", INDEFINITE)
@settings(max_examples=40)
@given(st.integers(3, 25), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_negative_curvature_is_found_and_shown(form, n, groups, seed):
    """Whether it lies outside of P's positive part by much or little: the direction is verified."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    P = basis @ np.diag(rng.uniform(0.5, 2, n)) @ basis.T
    F, h, sums, off = draw_system(rng, n, min(groups, n))
    E = (sums[:, None] == np.arange(len(off))).astype(float)
    v = rng.standard_normal(len(F))
    v -= E @ np.linalg.lstsq(E, v, rcond=None)[0] if len(off) else 0.0
    if np.linalg.norm(v) < 1e-6:
        return  # no direction keeps the sums
    v /= np.linalg.norm(v)
    P[np.ix_(F, F)] -= 4 * np.outer(v, v)  # curvature -2 at most along v
    P = 0.5 * (P + P.T)
    with pytest.raises(NonConvexError) as caught:
        make_face(INDEFINITE[form](P)).kkt(F, h, sums, off, None)
    d = caught.value.direction
    np.testing.assert_allclose(np.linalg.norm(d), 1)
    assert (np.delete(d, F) == 0).all()
    np.testing.assert_allclose(E.T @ d[F], 0, atol=1e-10)
    assert caught.value.curvature < 0
    np.testing.assert_allclose(d @ P @ d, caught.value.curvature, rtol=1e-8)


def test_negative_curvature_that_a_border_brings_is_found():
    """The base is definite; the coordinate that joins it makes it indefinite."""
    rng = np.random.default_rng(4)
    _, _, P = definite(rng, 40)
    P[-1] = P[:, -1] = 0.0
    P[-1, :20] = P[:20, -1] = 1.0
    P[-1, -1] = 0.1
    face = make_face(DenseHessian(P))
    base = np.arange(39)
    face.kkt(base, np.ones(39), np.full(39, -1), np.zeros(0), None)
    with pytest.raises(NonConvexError) as caught:
        face.kkt(np.arange(40), np.ones(40), np.full(40, -1), np.zeros(0), None)
    d = caught.value.direction
    assert d @ P @ d < -0.1


def test_a_border_that_keeps_the_sum_convex_is_solved():
    """Indefinite as a whole, convex on the sum: found through the border as well."""
    rng = np.random.default_rng(5)
    P = dented(rng, 40, 0.02)
    P[:30, :30] += 0.02 * 2  # the first thirty alone are definite
    P = 0.5 * (P + P.T)
    assert np.linalg.eigvalsh(P[:30, :30])[0] > 0
    face = make_face(DenseHessian(P))
    for F in (np.arange(30), np.arange(33), np.arange(34)):
        h = rng.standard_normal(len(F))
        system = (F, h, np.zeros(len(F), np.int64), np.array([0.5]), None)
        assert_solved(P, system, face.kkt(*system), 1e-7)


# -- singular ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30)
@given(st.integers(3, 25), st.integers(0, 2**32 - 1))
def test_a_singular_system_with_a_solution_is_solved(form, n, seed):
    """Any solution: the equations hold."""
    rng = np.random.default_rng(seed)
    F, P = rng.standard_normal((n, max(1, n // 2))), None
    P = F @ F.T
    free, _, sums, off = draw_system(rng, n, 1)
    K = P[np.ix_(free, free)]
    h = K @ rng.standard_normal(len(free)) + rng.standard_normal()
    d, y = make_face(hessian(form, F, np.zeros(n))).kkt(free, h, sums, off, None)
    np.testing.assert_allclose(d.sum(), off[0], atol=1e-7 * (1 + np.abs(d).sum()))
    np.testing.assert_allclose(K @ d + y, h, atol=1e-6 * (1 + np.abs(h).max()))


@pytest.mark.parametrize("form", FORMS)
def test_without_a_solution_the_step_is_long_flat_and_downhill(form):
    rng = np.random.default_rng(6)
    F = rng.standard_normal((12, 5))
    P, free = F @ F.T, np.arange(12)
    h = rng.standard_normal(12)
    d, _ = make_face(hessian(form, F, np.zeros(12))).kkt(free, h, np.zeros(12, np.int64), np.zeros(1), None)
    size = np.linalg.norm(d)
    assert size > 1e6
    assert abs(d.sum()) <= 1e-6 * size
    assert d @ P @ d <= 1e-8 * np.trace(P) * size**2
    assert h @ d > 0


def test_factors_with_zeros_in_the_diagonal_beyond_what_is_formed(monkeypatch):
    """More coordinates than are formed densely: the zeros get a ridge, and what remains is a small residual."""
    monkeypatch.setattr(faces, "MOST_DENSE", 5)
    rng = np.random.default_rng(7)
    F, D = rng.standard_normal((30, 4)), np.where(np.arange(30) % 3 == 0, 0.0, 0.5)
    P, free = F @ F.T + np.diag(D), np.arange(30)
    h = P @ rng.standard_normal(30)
    d, y = make_face(LowRank(F, D)).kkt(free, h, np.zeros(30, np.int64), np.zeros(1), None)
    assert abs(d.sum()) <= 1e-6 * np.abs(d).sum()
    np.testing.assert_allclose(P @ d + y, h, atol=1e-5 * np.abs(h).max())


def test_an_indefinite_matrix_too_large_to_examine_is_an_error(monkeypatch):
    monkeypatch.setattr(faces, "MOST_DENSE", 5)
    P = np.diag([1.0] * 9 + [-1.0])
    with pytest.raises(ValueError, match="not positive definite on 10 free coordinates"):
        make_face(DenseHessian(P)).kkt(np.arange(10), np.ones(10), np.full(10, -1), np.zeros(0), None)


def test_faces_suit_the_form():
    rng = np.random.default_rng(8)
    F, D, _ = definite(rng, 6, 2)
    names = [type(make_face(hessian(form, F, D))).__name__ for form in FORMS]
    assert names == ["DenseFace", "SparseFace", "LowRankFace", "LowRankFace", "OperatorFace"]
