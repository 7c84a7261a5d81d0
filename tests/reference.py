"""Slow and plain reference implementations, and random cases to compare with.

Everything here is written from the statements of THEORY, not from the package: full sorts, all pairs, no laziness.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """Input of ``bcd.steepest_l1``."""

    grad: np.ndarray
    rise: np.ndarray
    fall: np.ndarray
    lipschitz: float
    groups: np.ndarray | None = None

    @property
    def n(self) -> int:
        return len(self.grad)

    @property
    def labels(self) -> np.ndarray:
        """One label a coordinate, also where one sum covers all."""
        return np.zeros(self.n, np.int64) if self.groups is None else self.groups

    @property
    def sums(self) -> list[int]:
        """The labels of the sums that have a coordinate."""
        return [int(s) for s in np.unique(self.labels) if s >= 0]

    @property
    def eps(self) -> float:
        return float(np.finfo(self.grad.dtype).eps)

    def wide(self) -> Case:
        """The same numbers in float64."""
        return self._replace(grad=_wide(self.grad), rise=_wide(self.rise), fall=_wide(self.fall))

    def narrow(self) -> Case:
        """Rounded to float32."""
        return self._replace(**{k: getattr(self, k).astype(np.float32) for k in ("grad", "rise", "fall")})

    def compiled(self) -> tuple:
        """The first five arguments of the compiled functions."""
        labels = np.empty(0, np.int64) if self.groups is None else self.groups
        return self.grad, self.rise, self.fall, labels, int(labels.max(initial=0 if self.groups is None else -1)) + 1


def _wide(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float64)


def dense(n: int, index: np.ndarray, step: np.ndarray) -> np.ndarray:
    """A step as a vector of length n, float64."""
    d = np.zeros(n)
    d[index] = step
    return d


def model(case: Case, d: np.ndarray) -> float:
    """``<g, d> + L1/2 ||d||_1^2`` in float64."""
    return float(_wide(case.grad) @ d + 0.5 * case.lipschitz * np.abs(d).sum() ** 2)


# -- cases ------------------------------------------------------------------------------------------

GRADS = ("normal", "integers", "labels", "constant", "clustered", "ascending", "descending")
ROOMS = ("free", "mixed", "none", "tiny", "zero", "box")
GROUPS = ("one", "several", "mixed", "alone")


def random_grad(rng: np.random.Generator, n: int, style: str) -> np.ndarray:
    """Gradients: without ties, with many, as at the start of an SVM, and all the large ones in one stretch."""
    if style == "integers":
        return rng.integers(-3, 4, n).astype(float)
    if style == "labels":
        return rng.choice([-1.0, 1.0], n)
    if style == "constant":
        return np.full(n, rng.normal())
    g = rng.normal(size=n)
    if style == "clustered":
        begin = int(rng.integers(0, max(1, n - 127)))
        g[begin : begin + 128] *= 1e3
    if style == "ascending":
        return np.sort(g)
    return np.sort(g)[::-1].copy() if style == "descending" else g


def random_rooms(rng: np.random.Generator, n: int, style: str) -> tuple[np.ndarray, np.ndarray]:
    """Rooms to rise and to fall."""
    if style == "none":  # no bounds
        return np.full(n, np.inf), np.full(n, np.inf)
    if style == "zero":
        return np.zeros(n), np.zeros(n)
    if style == "box":  # x at the lower bound, at the upper bound, or between
        x = rng.choice([0.0, 1.0, 0.3], n)
        return 1.0 - x, x
    # not rng.random: its multiples of 2^-53 add and subtract without rounding, which would hide what rounding does
    rise, fall = rng.exponential(1e-6 if style == "tiny" else 0.5, (2, n))
    if style == "mixed":
        rise, fall = (np.where(rng.random(n) < 0.3, 0.0, a) for a in (rise, fall))
        rise, fall = (np.where(rng.random(n) < 0.1, np.inf, a) for a in (rise, fall))
    return rise, fall


def random_groups(rng: np.random.Generator, n: int, style: str) -> np.ndarray | None:
    """Labels: one sum, several, several and coordinates alone, all alone."""
    if style == "one":
        return None
    if style == "alone":
        return np.full(n, -1)
    return rng.integers(-1 if style == "mixed" else 0, 3, n)


def random_case(rng: np.random.Generator, n: int, groups: str | None = None) -> Case:
    """One case of random styles."""
    return Case(
        random_grad(rng, n, str(rng.choice(GRADS))),
        *random_rooms(rng, n, str(rng.choice(ROOMS))),
        float(np.exp(rng.uniform(-4, 2))),
        random_groups(rng, n, groups or str(rng.choice(GROUPS))),
    )


# -- the GS-1 subproblem ----------------------------------------------------------------------------


class _End:
    """One sorted end of a sum (or the coordinates alone): where the walk stands, and how much moved there."""

    def __init__(self, members: np.ndarray, key: np.ndarray, room: np.ndarray):
        self.order = members[np.argsort(key[members], kind="stable")]
        self.room, self.at, self.used = room, 0, 0.0

    def open(self) -> bool:
        return self.at < len(self.order)

    def here(self) -> int:
        return int(self.order[self.at])

    def left(self) -> float:
        return float(self.room[self.here()]) - self.used

    def take(self, mass: float) -> tuple[float, bool]:
        """Move mass here; the total moved at this coordinate, exactly its room if that is used up."""
        if mass == self.left() and mass < np.inf:
            total, self.used = float(self.room[self.here()]), 0.0
            self.at += 1
            return total, True
        self.used += mass
        return self.used, False


def _ends(case: Case) -> list[tuple[_End, ...]]:
    """The two ends of every sum, and one for the coordinates alone, all sorted whole."""
    g, rise, fall, labels = _wide(case.grad), _wide(case.rise), _wide(case.fall), case.labels
    out: list[tuple[_End, ...]] = []
    for s in range(int(labels.max(initial=-1)) + 1):
        up, down = (np.flatnonzero((labels == s) & (room > 0)) for room in (rise, fall))
        out.append((_End(up, g, rise), _End(down, -g, fall)))
    toward = np.where(g < 0, rise, fall)
    alone = np.flatnonzero((labels < 0) & (toward > 0) & (g != 0))
    if (labels < 0).any():
        out.append((_End(alone, -np.abs(g), toward),))
    return out


def _price(g: np.ndarray, ends: tuple[_End, ...]) -> float:
    """What one unit of the 1-norm gains now; -1 where an end is used up."""
    if not all(end.open() for end in ends):
        return -1.0
    if len(ends) == 1:
        return abs(float(g[ends[0].here()]))
    return 0.5 * (float(g[ends[1].here()]) - float(g[ends[0].here()]))


def sorted_walk(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """GS-1 by the walk of THEORY section 2 over fully sorted ends: (index in the order of the walk, step)."""
    g, ends = _wide(case.grad), _ends(case)
    moved: dict[int, float] = {}
    prices = [_price(g, e) for e in ends]
    norm = 0.0
    while prices and max(prices) > case.lipschitz * norm:
        s = prices.index(max(prices))
        more = prices[s] / case.lipschitz - norm
        if not more > 0:
            break
        mass = min([more / len(ends[s])] + [end.left() for end in ends[s]])
        norm += mass * len(ends[s])
        moving = False
        for which, end in enumerate(ends[s]):
            k = end.here()
            total, full = end.take(mass)
            rises = which == 0 if len(ends[s]) == 2 else g[k] < 0
            moved[k] = total if rises else -total
            moving |= full
        if not moving:
            break
        prices[s] = _price(g, ends[s])
    return np.array(list(moved), dtype=np.int64), np.array(list(moved.values()))


def sorted_block(case: Case, q: int) -> np.ndarray:
    """The GS-1 block: the first q coordinates of the walk, then pairs from both ends, best price first.

    It stops where the next pair, one coordinate from each end, would not gain.
    """
    g, ends = _wide(case.grad), _ends(case)
    block = sorted_walk(case)[0][:q].tolist()
    prices = [_price(g, e) for e in ends]
    while len(block) < q and prices and max(prices) > 0:
        s = prices.index(max(prices))
        for end in ends[s]:
            if end.here() not in block:
                block.append(end.here())
            end.at += 1
        prices[s] = _price(g, ends[s])
    return np.array(block[:q], dtype=np.int64)


def best_model_value(case: Case) -> float:
    """Minimum of the GS-1 subproblem, without a walk.

    In every sum the best gain from a move of 1-norm T is concave and piecewise linear in T; its slopes (prices) and
    the widths of its pieces follow from the cumulated rooms. Sort the pieces of all sums together, and minimise
    ``L/2 T^2 - gain(T)`` over T.
    """
    g, rise, fall, labels = _wide(case.grad), _wide(case.rise), _wide(case.fall), case.labels
    price, width = [], []
    for s in case.sums:
        up, down = (np.flatnonzero((labels == s) & (room > 0)) for room in (rise, fall))
        if len(up) == 0 or len(down) == 0:
            continue
        up, down = up[np.argsort(g[up])], down[np.argsort(-g[down])]
        above, below = np.cumsum(rise[up]), np.cumsum(fall[down])
        most = min(above[-1], below[-1])
        edges = np.unique(np.concatenate([[0.0], above, below]))
        edges = edges[edges <= most]
        left = edges[:-1]
        i, j = (np.minimum(np.searchsorted(c, left, side="right"), len(c) - 1) for c in (above, below))
        price += (0.5 * (g[down[j]] - g[up[i]])).tolist()
        width += (2 * np.diff(edges)).tolist()
    alone = labels < 0
    price += np.abs(g[alone]).tolist()
    width += np.where(g < 0, rise, fall)[alone].tolist()
    order = np.argsort(-np.array(price), kind="stable") if price else []
    norm = gain = 0.0
    for k in order:
        if price[k] <= case.lipschitz * norm:
            break
        piece = min(width[k], price[k] / case.lipschitz - norm)
        norm, gain = norm + piece, gain + price[k] * piece
        if piece < width[k]:
            break
    return 0.5 * case.lipschitz * norm**2 - gain


def kkt_residual(case: Case, d: np.ndarray) -> float:
    """By how much the KKT conditions of the GS-1 subproblem fail at d, in units of the gradient.

    The one-sided derivatives of the model at d along +-e_i are ``g_i + L1 T s`` with ``T = ||d||_1`` and s the sign of
    d_i (of the direction, where d_i = 0). A multiplier y of the sum must lie below all right derivatives of
    coordinates below their upper bound and above all left derivatives of those above their lower bound: multipliers of
    the bounds are then of the right sign and complementary. Alone: y = 0.
    """
    g, rise, fall, labels = _wide(case.grad), _wide(case.rise), _wide(case.fall), case.labels
    push = case.lipschitz * np.abs(d).sum()
    right = np.where(d < rise, g + push * np.where(d >= 0, 1.0, -1.0), np.inf)
    left = np.where(d > -fall, g + push * np.where(d > 0, 1.0, -1.0), -np.inf)
    worst = max(0.0, left[labels < 0].max(initial=-np.inf), -right[labels < 0].min(initial=np.inf))
    for s in case.sums:
        worst = max(worst, left[labels == s].max() - right[labels == s].min())
    return float(worst)


# -- pairs ------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """Raise i, lower j (one of them -1: a coordinate alone)."""

    i: int
    j: int
    gap: float
    room: float

    @property
    def norm(self) -> int:
        """1-norm of the move of mass 1."""
        return (self.i >= 0) + (self.j >= 0)


def all_moves(case: Case) -> list[Move]:
    """Every elementary move that descends, by (i, j)."""
    g, rise, fall = (_wide(a).tolist() for a in (case.grad, case.rise, case.fall))
    labels = case.labels.tolist()
    out = []
    for i in range(case.n):
        if labels[i] < 0:
            if g[i] < 0 < rise[i]:
                out.append(Move(i, -1, -g[i], rise[i]))
            if g[i] > 0 and fall[i] > 0:
                out.append(Move(-1, i, g[i], fall[i]))
        elif rise[i] > 0:
            for j in range(case.n):
                if labels[j] == labels[i] and fall[j] > 0 and g[j] > g[i]:
                    out.append(Move(i, j, g[j] - g[i], min(rise[i], fall[j])))
    return out


def movable(case: Case) -> np.ndarray:
    """Which coordinates take part in some move that descends."""
    g, labels = _wide(case.grad), case.labels
    up, down = case.rise > 0, case.fall > 0
    out = (labels < 0) & np.where(g < 0, up, down) & (g != 0)
    for s in case.sums:
        member = labels == s
        most, least = g[member & down].max(initial=-np.inf), g[member & up].min(initial=np.inf)
        out |= member & ((up & (g < most)) | (down & (g > least)))
    return out


def violation(case: Case) -> float:
    """V(x) of THEORY section 1, over all moves."""
    return max((move.gap for move in all_moves(case)), default=0.0)


def clipped_drop(case: Case, move: Move) -> float:
    """Decrease of the model ``<g, d> + L1/2 ||d||_1^2`` by the best feasible mass along a move."""
    t = min(move.gap / (case.lipschitz * move.norm**2), move.room)
    return move.gap * t - 0.5 * case.lipschitz * (move.norm * t) ** 2


def best_ratio(case: Case, weight: np.ndarray) -> float:
    """Largest gap / (w_i + w_j) over all moves: GSL."""
    return max((move.gap / sum(weight[k] for k in (move.i, move.j) if k >= 0) for move in all_moves(case)), default=0.0)


# -- constants --------------------------------------------------------------------------------------


def lipschitz(Q: np.ndarray, labels: np.ndarray) -> float:
    """L1 of THEORY section 1: pairs within a sum, single coordinates alone."""
    diagonal = Q.diagonal()
    pairs = (diagonal[:, None] + diagonal[None, :] - 2 * Q) / 4
    same = (labels[:, None] == labels[None, :]) & (labels >= 0)[:, None] & ~np.eye(len(Q), dtype=bool)
    return float(max(pairs[same].max(initial=0.0), diagonal[labels < 0].max(initial=0.0)))


def random_psd(rng: np.random.Generator, n: int, rank: int) -> np.ndarray:
    """A random positive semidefinite matrix."""
    A = rng.normal(size=(n, rank)) * rng.uniform(0.1, 3, (n, 1))
    Q = A @ A.T
    return 0.5 * (Q + Q.T)


def same_selection(found: Any, index: np.ndarray, step: np.ndarray) -> None:
    """Assert equality bit for bit."""
    np.testing.assert_array_equal(np.asarray(found.index), index)
    np.testing.assert_array_equal(np.asarray(found.step), step)
