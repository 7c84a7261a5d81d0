"""Entries computed by torch (on the CPU here) against the host's; errors that say what is missing."""

import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import scipy.sparse as sp
from duals import BY_NAME, MACHINES, certify, feasible_within_rounding, kernel_matrix, machine
from test_gram import EVERY, FORMS, N, data, drawn, layouts, rounding

from bcd import Status, gram_torch
from bcd import dual as dual_module
from bcd import gram as host_module
from bcd.dual import solve_dual
from bcd.gram import Expansion, Gram, Kernel, kernel_product
from bcd.gram_torch import TorchGram
from bcd.svm import SVC

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Neither side takes a shortcut for small data; several tiles and chunks here as well."""
    monkeypatch.setattr(host_module, "_SMALL_NS", -1.0)
    monkeypatch.setattr(gram_torch, "_TILE", 64 * 40)
    monkeypatch.setattr(gram_torch, "_COLUMNS", 64)
    monkeypatch.setattr(gram_torch, "_SLAB", 60)


def pair(X, kernel, precision="auto"):
    """The same matrix computed on a device and by the host."""
    gram, host = Gram(X, kernel, dtype=precision, device="cpu"), Gram(X, kernel, dtype=precision)
    assert isinstance(gram, TorchGram)
    for name in ("n", "dtype", "exact", "divisible", "precomputed", "through_weights"):
        assert getattr(gram, name) == getattr(host, name), name
    return gram, host


def same(found, expected, kernel, X, dtype, step=None):
    """To 1e-6 in float32 and 1e-12 in float64, of the largest number on the way."""
    assert isinstance(found, np.ndarray)
    assert found.dtype == expected.dtype
    size = rounding(kernel, X, X, dtype) / (16 * np.finfo(dtype).eps) * (1.0 if step is None else np.abs(step).sum())
    atol = (1e-6 if dtype == np.float32 else 1e-13) * max(1.0, size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# -- entries -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form", "dtype", "precision"), EVERY)
def test_every_kernel_against_the_host(name, form, dtype, precision):
    X, kernel = data(form, dtype), BY_NAME[name]
    gram, host = pair(X, kernel, precision)
    np.testing.assert_allclose(gram.diagonal, host.diagonal, rtol=1e-14)
    index, step = drawn()
    for asked in (None, np.float64, np.float32):
        block = gram.block(index, asked)
        same(block, host.block(index, asked), kernel, X, block.dtype.type)
        assert (block.diagonal() == gram.diagonal[index].astype(block.dtype)).all()
    for keep in (None, np.ones(90, bool)):
        out, true = np.linspace(-1, 1, N), np.linspace(-1, 1, N)
        gram.add_product(out, index, step, keep)
        host.add_product(true, index, step, keep)
        same(out, true, kernel, X, gram.dtype.type, step)
    for rows in (slice(None), slice(3, 80, 2), np.array([149, 0, 77]), np.arange(N) > 100, np.empty(0, np.int64)):
        exact = gram.exact_product(index, step, rows)
        same(exact, host.exact_product(index, step, rows), kernel, X, np.float64, step)
    part, host_part = gram.restrict(index), host.restrict(index)
    inner, by = drawn(90, 50, 4)
    out, true = np.zeros(90), np.zeros(90)
    part.add_product(out, inner, by)
    host_part.add_product(true, inner, by)
    same(out, true, kernel, X, gram.dtype.type, by)
    same(part.block(inner), host_part.block(inner), kernel, X, gram.dtype.type)
    same(part.block(inner, np.float64), host_part.block(inner, np.float64), kernel, X, np.float64)
    assert (part.n, part.diagonal.tolist()) == (90, gram.diagonal[index].tolist())
    gram.raise_precision()
    host.raise_precision()
    assert gram.exact
    assert gram.dtype == np.float64
    out, true = np.zeros(N), np.zeros(N)
    gram.add_product(out, index, step)
    host.add_product(true, index, step)
    same(out, true, kernel, X, np.float64, step)
    gram.team.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_precomputed_matrix(dtype):
    K = kernel_matrix(BY_NAME["rbf"], data("dense")).astype(dtype)
    K.flags.writeable = False
    gram, host = pair(K, Kernel("precomputed"))
    index, step = drawn()
    out, true = np.zeros(N), np.zeros(N)
    gram.add_product(out, index, step)
    host.add_product(true, index, step)
    np.testing.assert_allclose(out, true, rtol=1e-13, atol=1e-13)
    assert (gram.block(index) == host.block(index)).all()
    np.testing.assert_allclose(gram.exact_product(index, step, [4, 2]), true[[4, 2]], atol=1e-13)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [1, 3])
def test_kernel_product(name, form, dtype, columns):
    kernel, coef = BY_NAME[name], np.random.default_rng(7).normal(size=(N, columns))
    X, Z = data(form, dtype, 130, 5), data(form, dtype, N, 6)
    found = kernel_product(X, Z, kernel, coef, device="cpu")
    atol = rounding(kernel, X, Z, dtype) * np.abs(coef).sum(axis=0).max()
    np.testing.assert_allclose(found, kernel_matrix(kernel, X, Z) @ coef, rtol=0, atol=atol)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("a", "b"), [("dense", "thin"), ("thin", "dense"), ("full", "thin"), ("thin", "full")])
def test_kernel_product_of_dense_with_sparse_rows(name, a, b):
    kernel, rng = BY_NAME[name], np.random.default_rng(0)
    full = rng.normal(size=(70, 40)) + 1.0
    forms = {
        "dense": full,
        "full": sp.csr_array(full),
        "thin": sp.random_array((70, 40), density=0.1, format="csr", rng=rng),
    }
    coef = rng.normal(size=(70, 2))
    found = kernel_product(forms[a], forms[b], kernel, coef, device="cpu")
    expected = kernel_matrix(kernel, forms[a], forms[b]) @ coef
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * max(1.0, np.abs(expected).max()))


def test_an_expansion_has_the_precision_asked_for():
    X, kernel, coef = data("dense", np.float32), BY_NAME["rbf"], np.ones((N, 1))
    exact = kernel_matrix(kernel, X).sum(axis=1)
    for dtype, low, high in ((np.float32, 1e-9, 1e-3), (np.float64, 0.0, 1e-11)):
        error = np.abs(Expansion(X, kernel, coef, dtype=dtype, device="cpu")(X)[:, 0] - exact).max()
        assert low <= error <= high


def test_kernel_product_of_nothing():
    X, kernel = np.ones((3, 2)), BY_NAME["rbf"]
    assert kernel_product(X, X[:0], kernel, np.ones((0, 2)), device="cpu").tolist() == [[0, 0]] * 3
    assert kernel_product(X[:0], X, kernel, np.ones((3, 2)), device="cpu").shape == (0, 2)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["rbf", "linear", "laplacian", "cosine"])
def test_every_layout_of_memory(name, layout, dtype):
    """Torch takes neither read-only arrays nor negative strides by itself."""
    X, kernel = layouts(dtype)[layout], BY_NAME[name]
    gram, host = pair(X, kernel)
    index, step = drawn()
    out, true = np.zeros(N), np.zeros(N)
    gram.add_product(out, index, step)
    host.add_product(true, index, step)
    same(out, true, kernel, X, gram.dtype.type, step)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "laplacian"])
@pytest.mark.parametrize("width", [70_000, 2**31 + 10])
def test_wide_sparse_rows_stay_sparse(name, width):
    kernel, rng = BY_NAME[name], np.random.default_rng(0)
    features = np.sort(rng.choice(width, 60, replace=False))
    features[-1] = width - 1
    small = sp.random_array((50, 60), density=0.2, format="csr", rng=rng)
    X = sp.csr_array((small.data, features[small.indices], small.indptr), shape=(50, width))
    K, (index, step), out = kernel_matrix(kernel, small), drawn(50, 30), np.zeros(50)
    gram = Gram(X, kernel, dtype="float64", device="cpu")
    gram.add_product(out, index, step)
    np.testing.assert_allclose(out, K[:, index] @ step, atol=1e-12)
    np.testing.assert_allclose(gram.block(index), K[np.ix_(index, index)], atol=1e-13)
    product = kernel_product(sp.csr_array(X[:7]), X, kernel, np.ones((50, 1)), device="cpu")
    np.testing.assert_allclose(product[:, 0], K[:7].sum(axis=1), atol=1e-12)


def test_a_matrix_without_entries():
    for width in (5, 70_000):
        gram, out = Gram(sp.csr_array((20, width)), BY_NAME["rbf"], device="cpu"), np.zeros(20)
        gram.add_product(out, np.arange(4), np.ones(4))
        assert out.tolist() == [4.0] * 20


def test_tiles_keep_to_their_memory(monkeypatch):
    """Rows of a tile and columns at once are as many as fit, whatever is asked for."""
    monkeypatch.undo()
    sizes, tile = [], gram_torch._DeviceRows.tile

    def noted(self, lo, hi, columns, Z):
        K = tile(self, lo, hi, columns, Z)
        sizes.append((K.numel() * 8 + K.numel() * K.element_size(), Z.numel() * Z.element_size()))
        return K

    monkeypatch.setattr(gram_torch._DeviceRows, "tile", noted)
    monkeypatch.setattr(gram_torch, "_MEMORY", 1 << 20)
    monkeypatch.setattr(gram_torch, "_TILE", (1 << 20) // 32)
    X = np.random.default_rng(0).normal(size=(3000, 50))
    for form in (X, sp.csr_array(X * (X > 1.5))):
        gram = Gram(form, BY_NAME["rbf"], device="cpu", dtype="float64")
        gram.add_product(np.zeros(3000), np.arange(2000), np.ones(2000))
        gram.exact_product(np.arange(2000), np.ones(2000))
        gram.block(np.arange(1000))
    assert len(sizes) > 10
    tiles, columns = np.array(sizes).T
    assert tiles.max() <= 1 << 19
    assert columns.max() <= 1 << 18


def test_sums_are_float64():
    """Entries that are all 1 in float32, and steps of which the small one would be lost."""
    gram, out = Gram(np.zeros((5, 2), np.float32), BY_NAME["rbf"], device="cpu"), np.zeros(5)
    gram.add_product(out, np.arange(3), np.array([1e9, 1.0, -1e9]))
    assert out.tolist() == [1.0] * 5
    K = Gram(np.ones((5, 5), np.float32), Kernel("precomputed"), device="cpu")
    K.add_product(out, np.arange(3), np.array([1e9, 1.0, -1e9]))
    assert out.tolist() == [2.0] * 5


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_a_part(form):
    X, kernel = data(form), BY_NAME["poly"]
    K, (outer, _), (inner, _) = kernel_matrix(kernel, X), drawn(), drawn(90, 40, 5)
    part = Gram(X, kernel, device="cpu").restrict(outer).restrict(inner)
    index = outer[inner]
    np.testing.assert_allclose(part.block(np.arange(40), np.float64), K[np.ix_(index, index)], rtol=1e-11, atol=1e-11)


def test_entries_are_counted_as_on_the_host():
    gram, out = Gram(data("dense"), BY_NAME["rbf"], device="cpu"), np.zeros(N)
    gram.add_product(out, np.arange(7), np.ones(7))
    assert gram.entries == 7 * N
    gram.block(np.arange(5))
    assert gram.entries == 7 * N + 25
    gram.add_product(out, np.arange(0), np.ones(0))
    assert gram.entries == 7 * N + 25


def test_settings_of_torch_do_not_reach_the_entries():
    """Its default dtype and gradients; its reduced precision of float32 products is suspended, then as before."""
    X, kernel = data("dense"), BY_NAME["rbf"]
    expected = Gram(X, kernel, device="cpu").block(np.arange(N))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        gram = Gram(X, kernel, device="cpu")
        assert gram.rows.X.dtype == torch.float32
        assert (gram.block(np.arange(N)) == expected).all()
        assert not gram.rows.X.requires_grad
        assert torch.get_float32_matmul_precision() == "medium"
        with gram_torch._full_precision:
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            with gram_torch._full_precision:
                pass
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_dtype(before)
        torch.set_float32_matmul_precision("highest")


def test_matrices_in_several_threads():
    X, (index, step) = data("sparse"), drawn()
    found = [np.zeros(N) for _ in range(4)]

    def work(k):
        gram = Gram(X, BY_NAME["rbf"], device="cpu")
        for _ in range(10):
            gram.add_product(found[k], index, step)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-12)


# -- whole solves --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("parts", [False, True])
def test_a_dual_is_solved(kind, form, parts, monkeypatch):
    """To the same objective as on the host, within the two gaps; the point is certified in float64."""
    if parts:
        for name, value in {"PART": 40, "WHOLE": 0, "LEAST": 8, "MOST": 32, "FEW": 0}.items():
            monkeypatch.setattr(dual_module, name, value)
    X = np.random.default_rng(0).normal(size=(200, 4))
    kernel = Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    dual = machine(kind, 200, 0, K)
    found, host = (solve_dual(Gram(form(X), kernel, device=device), dual, tol=1e-4) for device in ("cpu", None))
    certificate = certify(K, dual, found.x)
    assert found.status is host.status is Status.CONVERGED
    assert feasible_within_rounding(certificate)
    assert certificate.violation <= 1e-4 + 1e-12
    assert abs(found.objective - host.objective) <= found.gap + host.gap + 1e-9


@pytest.mark.parametrize("name", BY_NAME)
def test_a_dual_of_every_kernel(name):
    X = np.random.default_rng(0).normal(size=(120, 4))
    kernel = BY_NAME[name]
    K, dual = kernel_matrix(kernel, X), machine("svc", 120)
    found = solve_dual(Gram(X, kernel, device="cpu"), dual, tol=1e-6, time_limit=20)
    assert certify(K, dual, found.x).violation == pytest.approx(found.violation, abs=1e-10)
    assert found.status is Status.CONVERGED or name == "sigmoid"


def test_precision_rises_on_the_device(monkeypatch):
    for name, value in {"WHOLE": 0, "LEAST": 8, "MOST": 16}.items():
        monkeypatch.setattr(dual_module, name, value)
    X, kernel = np.random.default_rng(0).normal(size=(150, 2)), Kernel("rbf", gamma=0.05)
    gram = Gram(X, kernel, device="cpu")
    found = solve_dual(gram, machine("svc", 150, 0, None, 1e5), tol=1e-4)
    assert found.status is Status.CONVERGED
    assert found.dtype == np.float64
    assert gram.rows.X.dtype == torch.float64


@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_an_estimator_fits_and_predicts(form, kernel):
    X = np.random.default_rng(0).normal(size=(150, 4))
    y = np.sign(X[:, 0] * X[:, 1] + 0.1)
    here, there = (SVC(kernel=kernel, device=device, tol=1e-6).fit(form(X), y) for device in (None, "cpu"))
    np.testing.assert_allclose(here.decision_function(form(X)), there.decision_function(form(X)), atol=1e-4)
    assert there.dual_objective_ == pytest.approx(here.dual_objective_, rel=1e-7)


# -- errors --------------------------------------------------------------------------------------


def test_import_bcd_does_not_import_torch():
    code = "import sys, bcd, bcd.svm, bcd.gram, bcd.dual; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_torch_the_error_says_what_to_install():
    """In a process that cannot import it."""
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
from bcd.gram import Expansion, Gram, Kernel, kernel_product
X = np.eye(2)
for call in (lambda: Gram(X, Kernel(), device="cuda"), lambda: kernel_product(X, X, Kernel(), X, device="cuda")):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.search(r"device='cuda' needs PyTorch.*pip install torch.*device=None", line)


@pytest.mark.parametrize("device", ["gpu", "", "cuda0", "cpu:x", 1.5])
def test_a_device_that_torch_does_not_know(device):
    with pytest.raises(ValueError, match=r'device must be a device of PyTorch such as "cpu" or "cuda"; found'):
        Gram(np.eye(2), Kernel(), device=device)
    with pytest.raises(ValueError, match="device must be"):
        kernel_product(np.eye(2), np.eye(2), Kernel(), np.ones((2, 1)), device=device)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_a_device_that_cannot_be_used(device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used for float64 sums here"):
        Gram(np.eye(2), Kernel(), device=device)


def test_no_cuda_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(
            ValueError, match=rf"device='{device}', but PyTorch .* sees no CUDA device here; use device="
        ):
            Gram(np.eye(2), Kernel(), device=device)


def test_callables_are_refused():
    kernel = Kernel(function=lambda A, B: A @ B.T)
    with pytest.raises(ValueError, match=r"a callable kernel cannot be computed on a device.*kernel='precomputed'"):
        Gram(np.eye(2), kernel, device="cpu")
    with pytest.raises(ValueError, match="a callable kernel cannot be computed on a device"):
        kernel_product(np.eye(2), np.eye(2), kernel, np.ones((2, 1)), device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_kernel_on_cuda():
    """Where there is one; see docs/gpu.md."""
    index, step = drawn()
    for name, form, dtype, precision in (case.values for case in EVERY):
        X, kernel = data(form, dtype), BY_NAME[name]
        gram, host = Gram(X, kernel, dtype=precision, device="cuda"), Gram(X, kernel, dtype=precision)
        out, true = np.zeros(N), np.zeros(N)
        gram.add_product(out, index, step)
        host.add_product(true, index, step)
        same(out, true, kernel, X, gram.dtype.type, step)
        same(gram.block(index), host.block(index), kernel, X, gram.dtype.type)
        same(gram.exact_product(index, step), host.exact_product(index, step), kernel, X, np.float64, step)
