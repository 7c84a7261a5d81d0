# SPDX-License-Identifier: BSD-3-Clause
"""Selection and SVMs on a CUDA device: the same as on the host."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import scipy.sparse as sp  # noqa: E402

import bcd  # noqa: E402
from bcd.svm import SVC, SVR, NuSVC, NuSVR, OneClassSVM  # noqa: E402


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [1, 2, 33, 1000, 20_000])
def test_selection_gives_the_numpy_result_bit_for_bit(n, dtype):
    rng = np.random.default_rng(n)
    for constant in (10.0, 1.0, 1e-3):
        host = [rng.normal(size=n).astype(dtype), *rng.random((2, n)).astype(dtype)]
        index, step = bcd.steepest_l1(*host, constant)
        found = bcd.steepest_l1(*(torch.from_numpy(a).cuda() for a in host), constant)
        assert found.index.device.type == found.step.device.type == "cuda"
        np.testing.assert_array_equal(found.index.cpu().numpy(), index)
        np.testing.assert_array_equal(found.step.cpu().numpy(), step)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("kernel", ["rbf", "linear", "poly"])
@pytest.mark.parametrize("machine", [SVC, NuSVC, SVR, NuSVR, OneClassSVM], ids=lambda machine: machine.__name__)
def test_an_estimator_fits_and_predicts(machine, kernel, form):
    X = np.random.default_rng(0).normal(size=(400, 5))
    y = np.sign(X[:, 0] + 0.5 * X[:, 1] * X[:, 2])
    nu = {"nu": 0.6} if machine in (NuSVC, NuSVR, OneClassSVM) else {}
    here, there = (machine(kernel=kernel, device=device, tol=1e-6, **nu).fit(form(X), y) for device in (None, "cuda"))
    assert there.dual_objective_ == pytest.approx(here.dual_objective_, rel=1e-6, abs=1e-7)
    if machine in (SVC, NuSVC):
        np.testing.assert_array_equal(here.predict(form(X)), there.predict(form(X)))
    elif machine is OneClassSVM:
        values = (m.decision_function(form(X)) for m in (here, there))
        np.testing.assert_allclose(*values, atol=1e-4 * max(1.0, there.dual_objective_))
    else:
        np.testing.assert_allclose(here.predict(form(X)), there.predict(form(X)), atol=1e-3)
