"""Hypothesis strategies for the selection rules."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from reference import Case, random_case

# Magnitudes between 1e-3 and 1e3, so that relative rounding bounds hold in float32 as well (no subnormal steps);
# a coarse grid beside them for ties. Dividing by 3 fills the mantissas: sums of short ones would not round.
_magnitude = st.floats(2.0**-10, 2.0**10).map(lambda v: v / 3)
_grid = st.integers(-8, 8).map(lambda k: k / 4)
_gradient = st.one_of(_grid, _magnitude, _magnitude.map(lambda v: -v))
_room = st.one_of(st.just(0.0), st.just(np.inf), st.integers(0, 8).map(lambda k: k / 4), _magnitude)
_lipschitz = st.one_of(st.sampled_from([0.25, 0.5, 1.0, 2.0]), st.floats(2.0**-6, 2.0**6))
DTYPES = (np.float64, np.float32)


@st.composite
def labels(draw, n: int, styles: tuple[str, ...] = ("one", "several", "mixed", "alone")) -> np.ndarray | None:
    """Labels of n coordinates; None: one sum over all."""
    style = draw(st.sampled_from(styles))
    if style == "one":
        return None
    low, high = {"several": (0, 3), "mixed": (-1, 2), "alone": (-1, -1)}[style]
    return np.array(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)), dtype=np.int64)


@st.composite
def small_cases(draw, groups: tuple[str, ...] = ("one", "several", "mixed", "alone"), bounded: bool = True) -> Case:
    """Up to 12 coordinates, drawn one by one: these shrink."""
    n = draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(DTYPES))

    def vector(entry: st.SearchStrategy) -> np.ndarray:
        return np.array(draw(st.lists(entry, min_size=n, max_size=n)), dtype=dtype)

    constant = draw(st.integers(0, 9)) == 0
    grad = np.full(n, draw(_gradient), dtype) if constant else vector(_gradient)
    rooms = [vector(_room) if bounded else np.full(n, np.inf, dtype) for _ in range(2)]
    return Case(grad, *rooms, draw(_lipschitz), draw(labels(n, groups)))


@st.composite
def seeded_cases(draw, groups: tuple[str, ...] = ("one", "several", "mixed", "alone"), most: int = 400) -> Case:
    """Up to ``most`` coordinates of the styles of reference.random_case, from a drawn seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    case = random_case(rng, draw(st.integers(1, most)), draw(st.sampled_from(groups)))
    return case if draw(st.booleans()) else case.narrow()


def cases(groups: tuple[str, ...] = ("one", "several", "mixed", "alone"), most: int = 400) -> st.SearchStrategy[Case]:
    """Small cases that shrink and larger ones that do not."""
    return st.one_of(small_cases(groups), seeded_cases(groups, most))
