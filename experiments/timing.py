# SPDX-License-Identifier: BSD-3-Clause
"""Fair timings: the contestants take turns, every repetition is kept, and nothing compiles meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def seconds(work: Callable[[], Any], calls: int = 1) -> float:
    """Wall-clock seconds of one of ``calls`` calls in a row."""
    started = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - started) / calls


def interleaved(
    works: Mapping[str, Callable[[], Any]], repetitions: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Time every work once a round, in an order that rotates from round to round.

    Parameters
    ----------
    works : mapping of str to callable
    repetitions : int
        Rounds; one round before them warms up and is not counted.
    at_least : float
        Seconds a measurement should last: short works are called several times in it.

    Returns
    -------
    dict of str to list of float
        Seconds a call, one entry a round.
    """
    calls = {}
    for name, work in works.items():
        work()
        calls[name] = max(1, int(at_least / max(seconds(work), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    for _ in range(repetitions):
        for name in order:
            times[name].append(seconds(works[name], calls[name]))
        order = order[1:] + order[:1]
    return times


def ratio(a: list[float], b: list[float]) -> float:
    """Median over the rounds of a / b: what disturbed a round disturbed both."""
    return float(np.median(np.array(a) / np.array(b)))


def best_ratio(a: list[float], b: list[float]) -> float:
    """Shortest a over shortest b: what is left of a ratio when others use the machine as well."""
    return min(a) / min(b)
