# SPDX-License-Identifier: BSD-3-Clause
"""The compiler as the package uses it."""

import signal
import threading

import numba
import numpy as np
import pytest
from numba.core import event

import bcd
from bcd import _jit

LOCK = "numba:compiler_lock"


def test_ctrl_c_while_the_compiler_works_comes_when_it_is_done():
    event.start_event(LOCK)
    event.start_event(LOCK)
    signal.raise_signal(signal.SIGINT)  # raised here it would be lost in a callback of LLVM's
    event.end_event(LOCK)
    with pytest.raises(KeyboardInterrupt):
        event.end_event(LOCK)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_is_called_then():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        event.start_event(LOCK)
        signal.raise_signal(signal.SIGINT)
        assert heard == []
        event.end_event(LOCK)
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_real_compilation_is_finished_first(monkeypatch):
    def twice(x):
        return 2 * x

    compiled = numba.njit(twice)
    lowered = numba.core.lowering.Lower.lower
    monkeypatch.setattr(
        numba.core.lowering.Lower, "lower", lambda self: (signal.raise_signal(signal.SIGINT), lowered(self))[1]
    )
    with pytest.raises(KeyboardInterrupt):
        compiled(3)
    assert compiled.signatures
    assert compiled(3) == 6


def test_other_threads_compile_without_signals():
    found = []
    thread = threading.Thread(target=lambda: found.append(numba.njit(lambda x: x + 1)(1)))
    thread.start()
    thread.join()
    assert found == [2]


def test_ctrl_c_before_the_first_step_gives_the_start_back():
    class Pressing(bcd.selection.GS1):
        def init(self, moves, seed):
            signal.raise_signal(signal.SIGINT)
            return super().init(moves, seed)

    problem = bcd.Problem(bcd.Quadratic(np.eye(3), [0.0, 1.0, 2.0]), bcd.SumBox(lower=0, total=1))
    result = bcd.minimize(problem, Pressing(), x0=[0.0, 0.0, 1.0])
    assert result.status is bcd.Status.INTERRUPTED
    assert result.x.tolist() == [0, 0, 1]


def test_without_a_place_for_the_cache_it_compiles_and_says_so(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")

    monkeypatch.setattr(numba.core.dispatcher.Dispatcher, "enable_caching", refuse)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        compiled = _jit.njit(cache=True)(lambda x: x + 1)
    assert compiled(1) == 2


def test_a_problem_must_be_one():
    with pytest.raises(ValueError, match=r"problem must be a bcd\.Problem; found ndarray"):
        bcd.minimize(np.eye(3))
