# SPDX-License-Identifier: BSD-3-Clause
"""Every compiled (numba) function of the package.

All functions take and return arrays and scalars, keep no state, and are cached on disk after their
first compilation. Notation, as everywhere in the package: ``grad`` is the gradient g, ``rise`` = u - x
and ``fall`` = x - l are the rooms of a coordinate, ``labels`` gives the sum constraint a coordinate
belongs to (negative: none, the coordinate moves alone; an array of length 0: all belong to one sum).

The *price* of a group is what one unit of the 1-norm of a move in it gains to first order:
``(largest g that can fall - smallest g that can rise) / 2`` for a sum (a pair move of mass t has
1-norm 2 t) and ``|g_i|`` for a coordinate that moves alone. The largest price is the dual norm of the
gradient on the feasible directions.
"""

from __future__ import annotations

import numpy as np

from bcd._jit import njit
from bcd._vector import LANES, TINY, scan_gain, scan_moved

FIRST_PREFIX = 8  # coordinates of an end sorted at first; four times more whenever they run out
GROW_PREFIX = 4
SAMPLE = 4096  # coordinates whose quantiles stand for those of all
EPS = np.finfo(np.float64).eps
CONCAVITY = 1e-10  # negative curvature, relative to the diagonal, that passes for rounding


# ---------------------------------------------------------------------------------------------
# The two sorted ends of the gradient, found without sorting: selection.steepest_l1
# ---------------------------------------------------------------------------------------------


@njit(cache=True)
def _key(end, g, rise, fall):
    """Sorting key of a coordinate at an end: larger is visited earlier, -inf cannot move there.

    end 0: rising (smallest g first); end 1: falling (largest g first); end 2: either way, alone.
    """
    if end == 0:
        return -g if rise > 0 else -np.inf
    if end == 1:
        return g if fall > 0 else -np.inf
    alone = max(-g if rise > 0 else -np.inf, g if fall > 0 else -np.inf)
    return alone if alone > 0 else -np.inf


@njit(cache=True)
def _chunk_size(n):
    """Coordinates a chunk: small ones give sharper thresholds, large ones vectorise and stay few."""
    return 16 if n < 16384 else 128


@njit(cache=True, error_model="numpy")
def _chunk_keys(grad, rise, fall, size, alone, keys0, keys1):
    """Largest key of both ends in every chunk, in one pass. Returns False if a gradient is not finite.

    For coordinates that move alone, keys0 gets the largest key of either way.
    """
    zero = 0.0
    for c in range(keys0.shape[0]):
        end = min(grad.shape[0], (c + 1) * size)
        g, a, b = grad[c * size : end], rise[c * size : end], fall[c * size : end]
        best0, best1 = -np.inf, -np.inf
        for k in range(g.shape[0]):
            v = np.float64(g[k])
            zero += v * 0.0  # NaN as soon as one entry is NaN or infinite
            up = -v if a[k] > 0 else -np.inf
            down = v if b[k] > 0 else -np.inf
            best0 = up if up > best0 else best0
            best1 = down if down > best1 else best1
        keys0[c], keys1[c] = best0, best1
        if alone:
            keys0[c] = max(best0, best1) if max(best0, best1) > 0 else -np.inf
    return zero == 0.0


@njit(cache=True)
def _threshold(end, m, keys, grad, rise, fall):
    """A value that about m keys of this end reach; -inf for all of them.

    While m is small, the m-th largest best key of a chunk; then a quantile of a sample.
    """
    if 3 * m <= 2 * keys.shape[0]:
        return np.partition(keys, keys.shape[0] - m)[keys.shape[0] - m]
    n = grad.shape[0]
    if 4 * m >= n:
        return -np.inf
    stride = max(1, n // SAMPLE)
    some = np.empty((n + stride - 1) // stride)
    for k in range(some.shape[0]):
        some[k] = -_key(end, np.float64(grad[k * stride]), rise[k * stride], fall[k * stride])
    some.sort()
    return -some[m // stride]


@njit(cache=True)
def _prefix(end, m, size, keys, grad, rise, fall):
    """The first (about m) coordinates of an end in order of (key, index), and whether these are all.

    Only chunks whose best key reaches the threshold are read again, so the cost is that of a pass over
    the chunks and O(m log m) while m is small, and O(n + m log m) after that.
    """
    threshold = _threshold(end, m, keys, grad, rise, fall)
    found, values = np.empty(grad.shape[0], np.int64), np.empty(grad.shape[0])
    count = ties = 0
    for c in range(keys.shape[0]):
        if keys[c] < threshold or keys[c] == -np.inf:
            continue
        for k in range(c * size, min(grad.shape[0], (c + 1) * size)):
            key = _key(end, np.float64(grad[k]), rise[k], fall[k])
            if key < threshold or key == -np.inf or (key == threshold and ties >= m):
                continue
            ties += key == threshold
            found[count], values[count] = k, -key
            count += 1
    order = np.argsort(values[:count], kind="mergesort")  # stable: ties stay in index order
    return found[order], threshold == -np.inf


@njit(cache=True)
def _sift_down(heap, size, price):
    """Restore the heap of groups (largest price first, then smallest group) after its root changed."""
    k = 0
    while True:
        best = k
        for child in (2 * k + 1, 2 * k + 2):
            if child < size:
                a, b = heap[child], heap[best]
                if price[a] > price[b] or (price[a] == price[b] and a < b):
                    best = child
        if best == k:
            return
        heap[k], heap[best] = heap[best], heap[k]
        k = best


@njit(cache=True)
def segments(labels, groups):
    """Counting sort of the coordinates by label; the last segment holds those in no sum."""
    start = np.zeros(groups + 2, np.int64)
    for label in labels:
        start[(label if label >= 0 else groups) + 1] += 1
    start = np.cumsum(start)
    where = np.empty(labels.shape[0], np.int64)
    fill = start.copy()
    for k in range(labels.shape[0]):
        s = labels[k] if labels[k] >= 0 else groups
        where[fill[s]] = k
        fill[s] += 1
    return where, start


@njit(cache=True)
def _offsets(start, size):
    """Where the chunks of every segment begin, and how many chunks there are in all."""
    chunks = np.zeros(start.shape[0], np.int64)
    for s in range(start.shape[0] - 1):
        chunks[s + 1] = chunks[s] + (start[s + 1] - start[s] + size - 1) // size
    return chunks


@njit(cache=True)
def _sorted_ends(m, size, keys, chunks, grad, rise, fall, start, alone):
    """The first m coordinates (or somewhat more, or all) of both ends of every segment, sorted."""
    segments = start.shape[0] - 1
    order = np.empty((2, grad.shape[0]), np.int64)
    length = np.zeros((2, segments), np.int64)
    whole = np.ones((2, segments), np.bool_)
    for s in range(segments):
        a, b = start[s], start[s + 1]
        for e in range(2):
            end = 2 if alone and s == segments - 1 else e
            if b == a or (end == 2 and e == 1):
                continue
            found, whole[e, s] = _prefix(
                end, m, size, keys[e, chunks[s] : chunks[s + 1]], grad[a:b], rise[a:b], fall[a:b]
            )
            length[e, s] = found.shape[0]
            order[e, a : a + found.shape[0]] = found + a
    return order, length, whole


@njit(cache=True)
def _price(s, pair, at, order, start, length, grad):
    """Price of segment s at the present positions on its ends; -1 when an end is used up."""
    if at[0, s] >= length[0, s] or (pair and at[1, s] >= length[1, s]):
        return -1.0
    g0 = np.float64(grad[order[0, start[s] + at[0, s]]])
    if not pair:
        return abs(g0)
    return 0.5 * np.float64(grad[order[1, start[s] + at[1, s]]]) - 0.5 * g0  # the halves cannot overflow


@njit(cache=True)
def _start_walk(grad, order, start, length, alone):
    """Positions on the ends, prices, and the heap of segments (largest price first)."""
    segments = start.shape[0] - 1
    at = np.zeros((2, segments), np.int64)
    price = np.empty(segments)
    for s in range(segments):
        pair = not (alone and s == segments - 1)
        price[s] = _price(s, pair, at, order, start, length, grad)
    return at, price, np.argsort(-price, kind="mergesort")


@njit(cache=True)
def walk(grad, rise, fall, order, start, length, whole, alone, lipschitz):
    """Walk the sorted ends of every segment: steepest descent in the 1-norm (docs/theory.md).

    Segment s is one sum constraint; ``order[e, start[s] : start[s] + length[e, s]]`` are its coordinates
    sorted for rising (e = 0) and falling (e = 1), and ``whole[e, s]`` says that no more exist. If
    ``alone``, the coordinates of the last segment move each by itself and are sorted by |g| in e = 0.
    Mass moves in the segment with the largest price until that price is at most lipschitz times the
    1-norm of what has moved (lipschitz = 0: until nothing gains any more).

    Returns (index, step, drop, norm, enough): the moved coordinates in the order of the walk, their
    steps (exactly +rise or -fall where the room is used up), ``drop = -<g, d>`` (inf when mass can move
    without end), ``norm = ||d||_1``, and False when the walk came to the end of a list that is not
    whole, so that longer lists are needed.
    """
    at, price, heap = _start_walk(grad, order, start, length, alone)
    segments = price.shape[0]
    used = np.zeros((2, segments))  # mass moved at the present positions
    total = length.sum()
    index, step = np.empty(total, np.int64), np.empty(total)
    slot = np.full((2, segments), -1, np.int64)  # where that coordinate stands in the output
    count, drop, norm = 0, 0.0, 0.0
    moving = True
    while moving and price[heap[0]] > 0:
        s = heap[0]
        pair = not (alone and s == segments - 1)
        ends = 2 if pair else 1
        more = price[s] / lipschitz - norm if lipschitz > 0 else np.inf
        if not more > 0:
            break
        mass = more / ends
        for e in range(ends):
            k = order[e, start[s] + at[e, s]]
            rises = e == 0 if pair else grad[k] < 0
            mass = min(mass, np.float64(rise[k] if rises else fall[k]) - used[e, s])
        drop += price[s] * mass * ends
        norm += mass * ends
        moving = False
        for e in range(ends):
            k = order[e, start[s] + at[e, s]]
            rises = e == 0 if pair else grad[k] < 0
            room = np.float64(rise[k] if rises else fall[k])
            if slot[e, s] < 0:
                slot[e, s], index[count] = count, k
                count += 1
            full = mass == room - used[e, s] and mass < np.inf
            used[e, s] = room if full else used[e, s] + mass
            step[slot[e, s]] = used[e, s] if rises else -used[e, s]
            if full:
                moving = True
                used[e, s], slot[e, s] = 0.0, -1
                at[e, s] += 1
                if at[e, s] == length[e, s] and not whole[e, s]:
                    return index[:0], step[:0], drop, norm, False
        price[s] = _price(s, pair, at, order, start, length, grad)
        _sift_down(heap, segments, price)
    return index[:count].copy(), step[:count].copy(), drop, norm, True


@njit(cache=True)
def fill(block, q, grad, order, start, length, whole, alone):
    """Add to a block the coordinates nearest the ends, largest price first, until it has q of them.

    Returns (block, enough); enough is False when longer lists are needed. Fewer than q are returned
    when no further pair would gain anything.
    """
    at, price, heap = _start_walk(grad, order, start, length, alone)
    segments = price.shape[0]
    named = np.zeros(grad.shape[0], np.bool_)
    index = np.empty(max(q, block.shape[0]) + 1, np.int64)
    count = block.shape[0]
    index[:count] = block
    named[block] = True
    while count < q and price[heap[0]] > 0:
        s = heap[0]
        pair = not (alone and s == segments - 1)
        advanced = False
        for e in range(2 if pair else 1):
            k = order[e, start[s] + at[e, s]]
            if not named[k]:
                named[k], index[count] = True, k
                count += 1
            if at[e, s] + 1 < length[e, s]:  # the last of one end stays, a partner to more of the other
                at[e, s] += 1
                advanced = True
            elif not whole[e, s]:
                return block, False
        price[s] = _price(s, pair, at, order, start, length, grad) if advanced else -1.0
        _sift_down(heap, segments, price)
    return index[: min(count, max(q, block.shape[0]))].copy(), True


@njit(cache=True)
def _gather(grad, rise, fall, labels, groups):
    """Sort the coordinates into segments, one a group, and those that move alone in a last one."""
    if labels.shape[0] == 0:
        start = np.array([0, grad.shape[0]])
        return grad, rise, fall, np.empty(0, np.int64), start, False
    where, start = segments(labels, groups)
    alone = start[groups + 1] > start[groups]
    start = start if alone else start[:-1]
    return grad[where], rise[where], fall[where], where, start, alone


@njit(cache=True)
def steepest(grad, rise, fall, labels, groups, lipschitz, q):
    """The GS-1 step (q = 0), or the block of q coordinates that contains it or begins it (q > 0).

    Returns (index, step, drop, norm, finite). The GS-1 step's coordinates come first in a block; a block
    too small for them comes with an empty step.
    """
    grad, rise, fall, where, start, alone = _gather(grad, rise, fall, labels, groups)
    size = _chunk_size(grad.shape[0])
    chunks = _offsets(start, size)
    keys = np.empty((2, chunks[-1]))
    finite = True
    for s in range(start.shape[0] - 1):
        a, b, c, d = start[s], start[s + 1], chunks[s], chunks[s + 1]
        lone = alone and s == start.shape[0] - 2
        finite &= _chunk_keys(grad[a:b], rise[a:b], fall[a:b], size, lone, keys[0, c:d], keys[1, c:d])
    m = max(FIRST_PREFIX, q)
    index, step, drop, norm, enough = np.empty(0, np.int64), np.empty(0), 0.0, 0.0, not finite
    while not enough:
        order, length, whole = _sorted_ends(m, size, keys, chunks, grad, rise, fall, start, alone)
        index, step, drop, norm, enough = walk(grad, rise, fall, order, start, length, whole, alone, lipschitz)
        if enough and q > 0:
            step = step if index.shape[0] <= q else step[:0]
            index, enough = fill(index[:q], q, grad, order, start, length, whole, alone)
        m *= GROW_PREFIX
    if where.shape[0] > 0:
        index = where[index]
    return index, step, drop, norm, finite


# ---------------------------------------------------------------------------------------------
# Violation and the pair rules
# ---------------------------------------------------------------------------------------------


@njit(cache=True)
def violating_ends(grad, rise, fall, labels, groups):
    """For every group the coordinate to raise and the one to lower, -1 where none can move.

    Returns (i, j), arrays of length groups + 1; the last entry is for coordinates in no sum: the one
    with the largest |g|, in i if it should rise and in j if it should fall.
    """
    i, j = np.full(groups + 1, -1), np.full(groups + 1, -1)
    if labels.shape[0] == 0:
        low, high = np.inf, -np.inf
        for k in range(grad.shape[0]):
            if grad[k] < low and rise[k] > 0:  # the gradient first: that branch is almost never taken
                low, i[0] = grad[k], k
            if grad[k] > high and fall[k] > 0:
                high, j[0] = grad[k], k
        return i, j
    best = 0.0
    for k in range(grad.shape[0]):
        s, g = labels[k], grad[k]
        if s < 0:
            if abs(g) > best and (rise[k] if g < 0 else fall[k]) > 0:
                best = abs(g)
                i[groups], j[groups] = (k, -1) if g < 0 else (-1, k)
            continue
        if rise[k] > 0 and (i[s] < 0 or g < grad[i[s]]):
            i[s] = k
        if fall[k] > 0 and (j[s] < 0 or g > grad[j[s]]):
            j[s] = k
    return i, j


@njit(cache=True)
def violation(grad, rise, fall, labels, groups):
    """V(x): 0 exactly at a KKT point, NaN when a gradient that matters is NaN."""
    i, j = violating_ends(grad, rise, fall, labels, groups)
    worst = 0.0
    for s in range(groups):
        if i[s] >= 0 and j[s] >= 0:
            worst = max(worst, grad[j[s]] - grad[i[s]])
    for k in (i[groups], j[groups]):
        if k >= 0:
            worst = max(worst, abs(grad[k]))
    return worst if np.isfinite(grad.sum()) else np.nan


@njit(cache=True)
def maximal_pair(grad, rise, fall, labels, groups):
    """GS-s: the maximal violating pair (i rises, j falls) of the group with the largest price.

    A coordinate that moves alone comes as (i, -1) or (-1, j). Returns (i, j, group), all -1 at a KKT point.
    """
    i, j = violating_ends(grad, rise, fall, labels, groups)
    best, group = 0.0, -1  # twice the price, since half of a tiny gap underflows
    for s in range(groups):
        if i[s] >= 0 and j[s] >= 0 and grad[j[s]] - grad[i[s]] > best:
            best, group = grad[j[s]] - grad[i[s]], s
    for k in (i[groups], j[groups]):
        if k >= 0 and 2 * abs(grad[k]) > best:
            best, group = 2 * abs(grad[k]), groups
    return (i[group], j[group], group) if group >= 0 else (-1, -1, -1)


@njit(cache=True, error_model="numpy")
def partner(grad, fall, labels, group, i, column, diagonal):
    """WSS2: the j that falls against i with the largest gap^2 / curvature (Fan, Chen, Lin 2005)."""
    best, j = -1.0, -1
    for k in range(grad.shape[0]):
        gap = grad[k] - grad[i]
        if fall[k] > 0 and gap > 0 and (labels.shape[0] == 0 or labels[k] == group):
            score = gap * gap / max(diagonal[i] + diagonal[k] - 2 * column[k], TINY)
            if score > best:
                best, j = score, k
    return j


@njit(cache=True, error_model="numpy")
def best_alone(grad, rise, fall, labels, diagonal):
    """Among the coordinates in no sum, the one with the largest g^2 / curvature."""
    best, i = -1.0, -1  # a score may underflow to 0
    for k in range(grad.shape[0]):
        if labels[k] < 0 and grad[k] != 0 and (rise[k] if grad[k] < 0 else fall[k]) > 0:
            score = grad[k] * grad[k] / max(diagonal[k], TINY)
            if score > best:
                best, i = score, k
    return i


@njit(cache=True)
def _model_decrease(gap, curvature, room):
    """(decrease, t) of the model -gap t + curvature t^2 / 2 at its best t in [0, room]."""
    if curvature == 0:
        return gap * room, room
    if curvature * room <= gap:
        return (gap - 0.5 * curvature * room) * room, room
    return 0.5 * gap * gap / curvature, gap / curvature


@njit(cache=True)
def best_model_pair(grad, rise, fall, labels, lipschitz):
    """GS-q: the feasible pair (i, j) with the largest decrease of the model with constant L2 = 2 lipschitz.

    A pair step of mass t decreases the model by ``gap t - L2 t^2``, a coordinate alone by
    ``|g| t - lipschitz t^2 / 2``; both are <g, d> + lipschitz / 2 ||d||_1^2. O(n^2). Returns (i, j, t).
    """
    best, bi, bj, bt = -1.0, -1, -1, 0.0  # a decrease may underflow to 0
    for i in range(grad.shape[0]):
        if labels.shape[0] > 0 and labels[i] < 0:
            if grad[i] == 0 or not (rise[i] if grad[i] < 0 else fall[i]) > 0:
                continue
            drop, t = _model_decrease(abs(grad[i]), lipschitz, rise[i] if grad[i] < 0 else fall[i])
            if drop > best:
                best, bt = drop, t
                bi, bj = (i, -1) if grad[i] < 0 else (-1, i)
            continue
        if not rise[i] > 0:
            continue
        for j in range(grad.shape[0]):
            gap = grad[j] - grad[i]
            if gap > 0 and fall[j] > 0 and (labels.shape[0] == 0 or labels[i] == labels[j]):
                drop, t = _model_decrease(gap, 4 * lipschitz, min(rise[i], fall[j]))
                if drop > best:
                    best, bi, bj, bt = drop, i, j, t
    return bi, bj, bt


@njit(cache=True, error_model="numpy")
def dinkelbach_pair(grad, rise, fall, labels, groups, weight):
    """GSL: the pair with the largest (g_j - g_i) / (w_i + w_j), by Dinkelbach's iteration in every group.

    Coordinates alone compete with |g| / w. Returns (i, j, t, rounds), t the unclipped step
    ``gap / (w_i + w_j)^2``.
    """
    ratio = np.zeros(groups)
    pair = np.full((2, groups), -1)
    rising, rounds = True, 0
    while rising:
        rising, rounds = False, rounds + 1
        low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
        now = np.full((2, groups), -1)
        for k in range(grad.shape[0]):
            s = 0 if labels.shape[0] == 0 else labels[k]
            if s < 0:
                continue
            up, down = grad[k] + ratio[s] * weight[k], grad[k] - ratio[s] * weight[k]
            if rise[k] > 0 and up < low[s]:
                low[s], now[0, s] = up, k
            if fall[k] > 0 and down > high[s]:
                high[s], now[1, s] = down, k
        for s in range(groups):
            i, j = now[0, s], now[1, s]
            if i >= 0 and j >= 0 and i != j:
                value = (grad[j] - grad[i]) / (weight[i] + weight[j])
                if value > ratio[s]:
                    ratio[s], pair[0, s], pair[1, s], rising = value, i, j, True
    best, i, j, t = 0.0, -1, -1, 0.0
    for s in range(groups):
        if pair[0, s] >= 0 and ratio[s] > best:
            best, i, j = ratio[s], pair[0, s], pair[1, s]
            t = best / (weight[i] + weight[j])
    for k in range(labels.shape[0]):
        if labels[k] < 0 and abs(grad[k]) / weight[k] > best and (rise[k] if grad[k] < 0 else fall[k]) > 0:
            best = abs(grad[k]) / weight[k]
            t = best / weight[k]
            i, j = (k, -1) if grad[k] < 0 else (-1, k)
    return i, j, t, rounds


# ---------------------------------------------------------------------------------------------
# Pairs drawn without a gradient
# ---------------------------------------------------------------------------------------------


@njit(cache=True)
def random_bits(seed, count):
    """The count-th 64-bit number of stream ``seed``: splitmix64 (Steele, Lea, Flood 2014), no state."""
    z = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(count) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True)
def random_below(seed, count, n):
    """An integer in [0, n); the bias, below n / 2^53, is far beyond any test of it."""
    return np.int64(np.float64(random_bits(seed, count) >> np.uint64(11)) * 2.0**-53 * n)


@njit(cache=True)
def shuffled(seed, epoch, n):
    """The random permutation of epoch number ``epoch`` (Fisher-Yates)."""
    order = np.arange(n)
    for k in range(n - 1, 0, -1):
        other = random_below(seed, epoch * n + k, k + 1)
        order[k], order[other] = order[other], order[k]
    return order


@njit(cache=True)
def _mate(a, offset, where, start, place):
    """The member of a's segment ``offset`` places after a (cyclically)."""
    s, p = place[0, a], place[1, a]
    size = start[s + 1] - start[s]
    return where[start[s] + (p + offset) % size]


@njit(cache=True)
def draw_cyclic(count, seed, order, where, start, place):
    """All coordinates in turn, each with the partner 1, 2, ... places on: every pair in n / 2 sweeps."""
    n = place.shape[1]
    a = count % n
    size = start[place[0, a] + 1] - start[place[0, a]]
    return a, _mate(a, 1 + (count // n) % max(size // 2, 1), where, start, place)


@njit(cache=True)
def draw_random(count, seed, order, where, start, place):
    """A uniform coordinate and a uniform other member of its group."""
    a = random_below(seed, 2 * count, place.shape[1])
    size = start[place[0, a] + 1] - start[place[0, a]]
    if size < 2:
        return a, a
    return a, _mate(a, 1 + random_below(seed, 2 * count + 1, size - 1), where, start, place)


@njit(cache=True)
def draw_permuted(count, seed, order, where, start, place):
    """Coordinates in a random order, new in every epoch, each with a uniform other member of its group."""
    n = place.shape[1]
    a = order[count % n]
    size = start[place[0, a] + 1] - start[place[0, a]]
    if size < 2:
        return a, a
    return a, _mate(a, 1 + random_below(seed, count, size - 1), where, start, place)


@njit(cache=True)
def orient(a, b, alone, grad):
    """Which of two drawn coordinates rises: (i, j), or (i, -1) / (-1, j) for one that moves alone."""
    if alone:
        return (a, -1) if grad[a] < 0 else (-1, a)
    return (a, b) if grad[a] < grad[b] else (b, a)


@njit(cache=True)
def can_gain(i, j, grad, rise, fall):
    """Whether raising i and lowering j (one of them -1: alone) is allowed and descends."""
    gap = (grad[j] if j >= 0 else 0.0) - (grad[i] if i >= 0 else 0.0)
    return gap > 0 and (i < 0 or rise[i] > 0) and (j < 0 or fall[j] > 0)


# ---------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------


@njit(cache=True)
def shift(x, rise, fall, lower, upper, index, step):
    """Move x, assigning the bound where a step uses up the room, and keep the rooms; mutates the first three.

    Returns the number of coordinates whose value changed.
    """
    changed = 0
    for m in range(index.shape[0]):
        k, d = index[m], step[m]
        old = x[k]
        if d >= rise[k]:
            x[k] = upper[k]
        elif -d >= fall[k]:
            x[k] = lower[k]
        else:
            x[k] = min(max(old + d, lower[k]), upper[k])
        rise[k], fall[k] = upper[k] - x[k], x[k] - lower[k]
        changed += x[k] != old
    return changed


@njit(cache=True, error_model="numpy")
def pair_mass(i, j, gap, curvature, rise, fall):
    """The minimising mass of a pair step (j < 0 or i < 0: of one coordinate), within the rooms."""
    t = gap / curvature if curvature > 0 else np.inf
    if i >= 0:
        t = min(t, rise[i])
    if j >= 0:
        t = min(t, fall[j])
    return t


@njit(cache=True)
def pair_curvature(i, j, Q, diagonal):
    """Second derivative along e_i - e_j (or e_i, e_j alone); coordinates beyond Q are slacks with none."""
    n = Q.shape[0]
    curvature = 0.0
    for k in (i, j):
        if 0 <= k < n:
            curvature += diagonal[k]
    if 0 <= i < n and 0 <= j < n:
        curvature -= 2 * Q[i, j]
    return curvature


@njit(cache=True)
def concave(curvature, i, j, diagonal):
    """Whether a curvature along i and j (one of them -1: alone) is negative beyond rounding."""
    scale = (abs(diagonal[i]) if i >= 0 else 0.0) + (abs(diagonal[j]) if j >= 0 else 0.0)
    return curvature < -CONCAVITY * scale


@njit(cache=True, error_model="numpy")
def add_row(grad, row, t):
    """Grad += t row."""
    for k in range(row.shape[0]):
        grad[k] += t * row[k]


@njit(cache=True, error_model="numpy")
def add_rows(grad, row_i, row_j, t):
    """Grad += t (row_i - row_j)."""
    for k in range(row_i.shape[0]):
        grad[k] += t * (row_i[k] - row_j[k])


@njit(cache=True)
def move_dense(grad, Q, index, step):
    """Grad += Q[:, index] step for a symmetric Q; indices beyond Q are slacks and change nothing."""
    n = Q.shape[0]
    if index.shape[0] == 2 and step[0] == -step[1] and max(index[0], index[1]) < n:
        add_rows(grad[:n], Q[index[0]], Q[index[1]], step[0])
        return
    for m in range(index.shape[0]):
        if index[m] < n:
            add_row(grad[:n], Q[index[m]], step[m])


@njit(cache=True)
def move_sparse(grad, data, indices, indptr, index, step):
    """Grad += Q[:, index] step for a symmetric Q in compressed form."""
    for m in range(index.shape[0]):
        if index[m] < indptr.shape[0] - 1:
            for p in range(indptr[index[m]], indptr[index[m] + 1]):
                grad[indices[p]] += step[m] * data[p]


@njit(cache=True)
def pair_extremes(Q, labels):
    """Largest and smallest curvature over the moves of 1-norm 1, and the pair of the smallest.

    That is (Q_ii + Q_jj - 2 Q_ij) / 4 over the pairs of one sum and Q_ii where i moves alone (then j = i).
    """
    n = Q.shape[0]
    high, low, bi, bj = 0.0, np.inf, 0, 0
    for i in range(n):
        for j in range(i + 1):
            alone = labels.shape[0] > 0 and labels[i] < 0
            if alone != (i == j) or (not alone and labels.shape[0] > 0 and labels[i] != labels[j]):
                continue
            c = Q[i, i] if alone else 0.25 * (Q[i, i] + Q[j, j] - 2 * Q[i, j])
            high = max(high, c)
            if c < low:
                low, bi, bj = c, i, j
    return high, low, bi, bj


@njit(cache=True)
def exact_sum(values):
    """Sum with the rounding errors carried along (Neumaier 1974); infinities add up as they should."""
    total, error, infinite = 0.0, 0.0, 0.0
    for v in values:
        if abs(v) == np.inf:
            infinite += v
            continue
        t = total + v
        error += (total - t) + v if abs(total) >= abs(v) else (v - t) + total
        total = t
    return total + error + infinite


@njit(cache=True)
def settle(x, rise, fall, lower, upper, where, start, totals, slop):
    """Take out of the sums what rounding has added, at the coordinates with the most room.

    Where none is inside its bounds, a sum that is off by at most ``slop`` stays: a bound is worth more than that.
    """
    for s in range(totals.shape[0]):
        member = where[start[s] : start[s + 1]]
        for _ in range(4):  # moving a large coordinate by a tiny amount may round again
            excess = exact_sum(x[member]) - totals[s]
            best, k = 0.0, -1
            for m in member:
                room = min(rise[m], fall[m], 1.0)
                if excess != 0 and room > best and abs(excess) <= room:
                    best, k = room, m
            for m in member:  # no coordinate is inside: take one that can move the right way
                room = fall[m] if excess > 0 else rise[m]
                if k < 0 and abs(excess) > slop[s] and room >= abs(excess):
                    k = m
            if k < 0:
                break
            old = x[k]
            x[k] = min(max(old - excess, lower[k]), upper[k])
            rise[k], fall[k] = upper[k] - x[k], x[k] - lower[k]
            if x[k] == old:
                break


@njit(cache=True, error_model="numpy")
def _mass(t, point, weight, lower, upper):
    """Sum and absolute sum of clip(point - t weight), and on both sides of t the slope and the next breakpoint."""
    total, size, left, right, below, above = 0.0, 0.0, 0.0, 0.0, -np.inf, np.inf
    for k in range(point.shape[0]):
        v = min(max(point[k] - t * weight[k], lower[k]), upper[k])
        total += v
        size += abs(v)
        first, last = (point[k] - upper[k]) / weight[k], (point[k] - lower[k]) / weight[k]
        if first < t <= last:
            left += weight[k]
        if first <= t < last:
            right += weight[k]
        for b in (first, last):
            if b < t:
                below = max(below, b)
            elif b > t:
                above = min(above, b)
    return total, size, left, right, below, above


@njit(cache=True, error_model="numpy")
def price(point, weight, lower, upper, total):
    """The t with sum(clip(point - t weight, lower, upper)) = total; weight > 0, the bounds allow the total.

    The sum falls in t and is linear between breakpoints: Newton's method inside a bracket, and from breakpoint to
    breakpoint where the sum is flat. A few passes over the data.
    """
    low, high, t = -np.inf, np.inf, 0.0
    for _ in range(500):
        now, size, left, right, below, above = _mass(t, point, weight, lower, upper)
        excess = now - total
        if abs(excess) <= EPS * size:
            return t
        if excess > 0:
            low, slope, nearest = t, right, above
        else:
            high, slope, nearest = t, left, below
        after = t + excess / slope if slope > 0 else nearest
        if slope > 0 and (after <= nearest if excess > 0 else after >= nearest):
            return after
        if not low < after < high:
            after = 0.5 * (low + high)
        if not np.isfinite(after) or after == t:
            return t
        t = after
    return t


@njit(cache=True, error_model="numpy")
def pivot(state, x, grad, y, labels, lower, upper, slack_x, slack_grad):
    """Change sides where a solution on the free coordinates says so; mutates state, returns how many changed.

    State is -1 at the lower bound, 1 at the upper one, 0 free. A free coordinate outside of its bounds goes to the
    bound, one at a bound whose gradient plus y pulls inwards becomes free.
    """
    changed = 0
    for k in range(state.shape[0]):
        if lower[k] == upper[k]:
            continue
        if state[k] == 0:
            if x[k] < lower[k] - slack_x * (1.0 + abs(lower[k])):
                state[k] = -1
                changed += 1
            elif x[k] > upper[k] + slack_x * (1.0 + abs(upper[k])):
                state[k] = 1
                changed += 1
            continue
        s = labels[k] if labels.shape[0] else 0
        pull = state[k] * (grad[k] + (y[s] if s >= 0 else 0.0))
        if pull > slack_grad:
            state[k] = 0
            changed += 1
    return changed


@njit(cache=True)
def examine(Q):
    """Largest |Q_ij - Q_ji| and where it is, and the largest |Q_ij|, off the diagonal.

    NaN comes first where an entry is not finite. One pass over the matrix, in tiles that the first-level cache holds.
    """
    n, tile = Q.shape[0], 32
    worst, largest, total, bi, bj = 0.0, 0.0, 0.0, 0, 0
    for a in range(0, n, tile):
        for b in range(0, a + 1, tile):
            for i in range(a, min(a + tile, n)):
                most = 0.0
                for j in range(b, min(b + tile, i)):
                    off = abs(Q[i, j] - Q[j, i])
                    total += off
                    most = max(most, off)
                    largest = max(largest, abs(Q[i, j]))
                if most > worst:
                    worst, bi = most, i
    for j in range(n):
        if worst > 0.0 and abs(Q[bi, j] - Q[j, bi]) == worst:
            bj = j
    return worst if np.isfinite(total) else np.nan, bi, bj, largest


@njit(cache=True, error_model="numpy")
def _least_partner(row, i, diagonal, labels):
    """The least of (Q_ii + Q_jj - 2 Q_ij) / (|Q_ii| + |Q_jj| + |Q_ij|) over j < i of one label, and j (-1: none)."""
    least, best = 0.0, -1
    for j in range(i):
        if labels.shape[0] == 0 or labels[i] == labels[j]:
            size = abs(diagonal[i]) + abs(diagonal[j]) + abs(row[j]) + TINY
            curvature = (diagonal[i] + diagonal[j] - 2.0 * row[j]) / size
            if curvature < least:
                least, best = curvature, j
    return least, best


@njit(cache=True)
def least_pair(Q, diagonal, labels):
    """The pair e_i - e_j of one label (empty: all are of one) of least relative curvature; that, i and j (-1: none)."""
    least, bi, bj = 0.0, -1, -1
    for i in range(Q.shape[0]):
        low, j = _least_partner(Q[i], i, diagonal, labels)
        if low < least:
            least, bi, bj = low, i, j
    return least, bi, bj


@njit(cache=True)
def gather_upper(Q, index, sums, extra, out):
    """Upper triangle of Q[index][:, index] into out, with ``extra`` added where two share a sum (a label >= 0)."""
    for a in range(index.shape[0]):
        row, to = Q[index[a]], out[a]
        for b in range(a, index.shape[0]):
            to[b] = row[index[b]]
        if sums[a] >= 0:
            for b in range(a, index.shape[0]):
                if sums[b] == sums[a]:
                    to[b] += extra


# ---------------------------------------------------------------------------------------------
# Whole loops on an explicit Hessian: what minimize() does one step at a time, many steps at once
# ---------------------------------------------------------------------------------------------


@njit(cache=True)
def block_curvature(Q, index, step):
    """D' Q d of a direction given by its non-zeros, O(k^2); slacks beyond Q have none."""
    n = Q.shape[0]
    total = 0.0
    for a in range(index.shape[0]):
        if index[a] < n:
            row, inner = Q[index[a]], 0.0
            for b in range(index.shape[0]):
                if index[b] < n:
                    inner += row[index[b]] * step[b]
            total += step[a] * inner
    return total


@njit(cache=True, error_model="numpy")
def largest_multiple(index, step, rise, fall):
    """The largest t for which t step stays within the rooms (inf when nothing limits it)."""
    t = np.inf
    for m in range(index.shape[0]):
        if step[m] != 0:
            t = min(t, (rise[index[m]] if step[m] > 0 else fall[index[m]]) / abs(step[m]))
    return t


@njit(cache=True)
def stretched(index, step, rise, fall, t):
    """T step, with every step that comes within rounding of its room made exactly that room."""
    out = t * step
    for m in range(index.shape[0]):
        room = rise[index[m]] if step[m] > 0 else fall[index[m]]
        if abs(out[m]) >= room * (1 - 4 * EPS):
            out[m] = room if step[m] > 0 else -room
    return out


# how a loop ended: after its steps or at tol; nothing could move; no curvature and no bound; negative curvature
RAN, STUCK, FLAT, CONCAVE = 0, 1, 2, 3


@njit(cache=True)
def _pair_step(i, j, Q, diagonal, grad, x, rise, fall, lower, upper):
    """One exact pair step. Returns how many coordinates changed, or -FLAT or -CONCAVE where it cannot be taken."""
    gap = (grad[j] if j >= 0 else 0.0) - (grad[i] if i >= 0 else 0.0)
    curvature = pair_curvature(i, j, Q, diagonal)
    if concave(curvature, i, j, diagonal):
        return -CONCAVE
    t = pair_mass(i, j, gap, curvature, rise, fall)
    if t == np.inf:
        return -FLAT
    index = np.array([i, j]) if i >= 0 and j >= 0 else np.array([max(i, j)])
    step = np.array([t, -t]) if i >= 0 and j >= 0 else np.array([t if i >= 0 else -t])
    changed = shift(x, rise, fall, lower, upper, index, step)
    move_dense(grad, Q, index, step)
    return changed


@njit(cache=True)
def second_order_pair(grad, rise, fall, labels, groups, Q, diagonal):
    """WSS2 on an explicit Hessian: i by gradient, j by gap^2 / curvature in i's group."""
    i, _, group = maximal_pair(grad, rise, fall, labels, groups)
    if group == groups:  # moves alone
        k = best_alone(grad, rise, fall, labels, diagonal)
        return (k, -1) if grad[k] < 0 else (-1, k)
    if i < 0:
        return -1, -1
    column = np.zeros(grad.shape[0])
    if i < Q.shape[0]:
        column[: Q.shape[0]] = Q[i]
    return i, partner(grad, fall, labels, group, i, column, diagonal)


MAXIMAL, SECOND_ORDER, MODEL, WEIGHTED = range(4)  # kinds of greedy_loop: GS-s, WSS2, GS-q, GSL
CYCLIC, RANDOM, PERMUTED = range(3)  # kinds of drawn_loop


@njit(cache=True)
def greedy_loop(kind, Q, diagonal, weight, lipschitz, grad, x, rise, fall, lower, upper, labels, groups, tol, steps):
    """Exact pair steps on the pairs that a greedy rule chooses; returns (steps done, columns, how it ended)."""
    columns = 0
    for done in range(steps):
        if kind == SECOND_ORDER:
            i, j = second_order_pair(grad, rise, fall, labels, groups, Q, diagonal)
        elif kind == MODEL:
            i, j, _ = best_model_pair(grad, rise, fall, labels, lipschitz)
        elif kind == WEIGHTED:
            i, j, _, _ = dinkelbach_pair(grad, rise, fall, labels, groups, weight)
        else:
            i, j, _ = maximal_pair(grad, rise, fall, labels, groups)
        gap = (grad[j] if j >= 0 else 0.0) - (grad[i] if i >= 0 else 0.0)
        if not gap > 2 * tol and violation(grad, rise, fall, labels, groups) <= tol:
            return done, columns, RAN
        changed = _pair_step(i, j, Q, diagonal, grad, x, rise, fall, lower, upper)
        if changed <= 0:
            return done, columns, -changed if changed < 0 else STUCK
        columns += (i >= 0) + (j >= 0)
    return steps, columns, RAN


@njit(cache=True)
def exact_multiple(drop, Q, index, step, rise, fall):
    """The multiple of a step that minimises the quadratic along it, within the rooms."""
    cap = largest_multiple(index, step, rise, fall)
    if cap <= 1:  # a coordinate is at its bound: with a valid constant the step is already the best multiple
        return cap
    scale = np.abs(step).max()  # the curvature of a tiny step could underflow
    curvature = block_curvature(Q, index, step / scale)
    return min(cap, drop / scale / curvature / scale) if curvature > 0 else cap


@njit(cache=True)
def steepest_loop(Q, lipschitz, grad, x, rise, fall, lower, upper, labels, groups, tol, steps):
    """GS-1 steps with exact line search."""
    columns = 0
    for done in range(steps):
        if violation(grad, rise, fall, labels, groups) <= tol:
            return done, columns, RAN
        index, step, drop, _, _ = steepest(grad, rise, fall, labels, groups, lipschitz, 0)
        t = exact_multiple(drop, Q, index, step, rise, fall) if drop < np.inf else np.inf
        if t == np.inf:
            return done, columns, FLAT
        step = stretched(index, step, rise, fall, t)
        move_dense(grad, Q, index, step)
        columns += index.shape[0]
        if shift(x, rise, fall, lower, upper, index, step) == 0:
            return done, columns, STUCK
    return steps, columns, RAN


@njit(cache=True, error_model="numpy")
def _move_and_argmin(grad, row_i, row_j, t, up):
    """Grad += t (row_i - row_j); returns the first argmin of grad + up, and that minimum.

    up is 0 where the coordinate can rise and inf where it cannot.
    """
    n = len(grad)
    whole = n - n % LANES
    least, i = scan_moved((grad, row_i, row_j, up), (t,), whole)
    for k in range(whole, n):  # the same for the last n % LANES entries
        grad[k] += t * (row_i[k] - row_j[k])
        if grad[k] + up[k] < least:
            least, i = grad[k] + up[k], k
    return i, least


@njit(cache=True, error_model="numpy")
def _best_partner(grad, low, row_i, diagonal, g_i, d_i):
    """First j with the largest (g_j - g_i)^2 / curvature over g_j + low_j > g_i, and that gain; -1 if there is none.

    low is 0 where the coordinate can fall and -inf where it cannot.
    """
    n = len(grad)
    whole = n - n % LANES
    most, j = scan_gain((grad, low, row_i, diagonal), (g_i, d_i), whole)
    for k in range(whole, n):
        gap = max(grad[k] + low[k] - g_i, 0.0)
        gain = gap * gap / max(d_i + diagonal[k] - 2.0 * row_i[k], TINY)
        if gain > most:
            most, j = gain, k
    return (j if most > 0.0 else -1), most


@njit(cache=True, error_model="numpy")
def _worst_gap(grad, low, least, start):
    """The violation, given the smallest gradient of every segment that can rise."""
    worst = 0.0
    for s in range(start.shape[0] - 1):
        for k in range(start[s], start[s + 1]):
            worst = max(worst, grad[k] + low[k] - least[s])
    return worst


@njit(cache=True, error_model="numpy", nogil=True)
def segment_pairs(Q, grad, x, lower, upper, diagonal, start, tol, steps, allowance):
    """WSS2 steps under one sum for every segment start[s] .. start[s + 1]; moves x and grad = Qx + c in place.

    Two passes a step: the last step reaches the gradient in the pass that finds i, the division that
    ranks the partners j is in the other. Of several segments the one with the largest gain moves. Q may be
    float32. Negative curvature beyond ``allowance`` times the diagonal ends the loop; within it the pair goes as
    far as its rooms allow. Returns (steps done, violation, how it ended).
    """
    segments = start.shape[0] - 1
    up = np.where(x < upper, 0.0, np.inf)
    low = np.where(x > lower, 0.0, -np.inf)
    least, first = np.empty(segments), np.empty(segments, np.int64)
    i = j = done = 0
    t = 0.0
    while True:
        for s in range(segments):
            a, b = start[s], start[s + 1]
            k, least[s] = _move_and_argmin(grad[a:b], Q[i, a:b], Q[j, a:b], t, up[a:b])
            first[s] = a + k
        i, j, most, g_i = 0, -1, 0.0, 0.0
        for s in range(segments):
            a, b = start[s], start[s + 1]
            if a == b:
                continue
            k = first[s]
            other, gain = _best_partner(grad[a:b], low[a:b], Q[k, a:b], diagonal[a:b], least[s], diagonal[k])
            if other >= 0 and gain > most:
                i, j, most, g_i = k, a + other, gain, least[s]
        # the pair's own gap is a lower bound of the violation: only a small one needs the maximum
        if j < 0 or done >= steps or grad[j] - g_i <= tol:
            worst = _worst_gap(grad, low, least, start)
            if j < 0 or done >= steps or worst <= tol:
                return done, worst, RAN
        curvature = diagonal[i] + diagonal[j] - 2.0 * Q[i, j]
        if curvature < -allowance * (abs(diagonal[i]) + abs(diagonal[j])):
            return done, grad[j] - g_i, CONCAVE
        t = (grad[j] - g_i) / curvature if curvature > 0 else np.inf
        rise, fall, x_i, x_j = upper[i] - x[i], x[j] - lower[j], x[i], x[j]
        if t < rise and t < fall:
            x[i] = min(x_i + t, upper[i])
            x[j] = max(x_j - t, lower[j])
        else:
            t = min(rise, fall)
            if t == np.inf:
                return done, grad[j] - g_i, FLAT
            x[i] = upper[i] if rise == t else x_i + t  # a bound is assigned: x + (upper - x) may miss it
            x[j] = lower[j] if fall == t else x_j - t
        if x[i] == x_i and x[j] == x_j:
            return done, grad[j] - g_i, STUCK
        done += 1
        for k in (i, j):
            up[k] = 0.0 if x[k] < upper[k] else np.inf
            low[k] = 0.0 if x[k] > lower[k] else -np.inf


@njit(cache=True, nogil=True)
def pair_loop(Q, grad, x, lower, upper, diagonal, tol, steps):
    """WSS2 steps under one sum over all coordinates, as :func:`segment_pairs`."""
    return segment_pairs(Q, grad, x, lower, upper, diagonal, np.array([0, len(grad)]), tol, steps, CONCAVITY)


@njit(cache=True)
def pair_steps(Q, grad, x, rise, fall, lower, upper, diagonal, tol, steps):
    """pair_loop that keeps the rooms as well; returns (steps done, how it ended)."""
    done, _, ended = pair_loop(Q, grad, x, lower, upper, diagonal, tol, steps)
    rise[:] = upper - x
    fall[:] = x - lower
    return done, ended


@njit(cache=True)
def drawn_loop(kind, Q, diagonal, grad, x, rise, fall, lower, upper, where, start, place, alone, count, seed, steps):
    """Exact pair steps on pairs drawn without looking at the gradient; returns (draws, columns, how it ended, pair)."""
    columns, n = 0, place.shape[1]
    order = shuffled(~seed, count // n, n)
    for done in range(steps):
        if kind == RANDOM:
            a, b = draw_random(count + done, seed, order, where, start, place)
        elif kind == PERMUTED:
            if (count + done) % n == 0:
                order = shuffled(~seed, (count + done) // n, n)
            a, b = draw_permuted(count + done, seed, order, where, start, place)
        else:
            a, b = draw_cyclic(count + done, seed, order, where, start, place)
        i, j = orient(a, b, alone and place[0, a] == start.shape[0] - 2, grad)
        if not can_gain(i, j, grad, rise, fall):
            continue
        changed = _pair_step(i, j, Q, diagonal, grad, x, rise, fall, lower, upper)
        if changed < 0:
            return done, columns, -changed, np.array([i, j])
        columns += (i >= 0) + (j >= 0)
    return steps, columns, RAN, np.array([-1, -1])


# ---------------------------------------------------------------------------------------------
# Projections onto a sum and bounds, row by row: projection.project_simplex, project_sum_box
# ---------------------------------------------------------------------------------------------

PATIENCE = 3  # passes in which the candidates must halve before a pivot makes them
BUDGET = 12  # entries looked at, over n, before Michelot's passes count as crawling
SOLVED = 1e-9  # excess after a Newton step, over that before: what is left is a matter of rounding
NEAR = 1e-6  # relative excess below which hardly a coordinate changes sides any more: plain Newton steps


@njit(cache=True, error_model="numpy")
def _split(t, low, high, count, index, point, weight, lower, upper):
    """Look at the candidates at t, and drop those without a breakpoint inside (low, high).

    Returns how many stay; sum and slope at t of all; of those dropped the slope and the sum extended to t = 0, which
    is their points where they are free. No branches: no predictor could guess.
    """
    kept, value, gone, slope, gone_slope = 0, 0.0, 0.0, 0.0, 0.0
    weighted = weight.shape[0] > 0
    for c in range(count):
        k = index[c]
        p, a, b = point[k], lower[k], upper[k]
        w = weight[k] if weighted else 1.0
        first, last = (p - b) / w, (p - a) / w
        keep = ((first > low) & (first < high)) | ((last > low) & (last < high))
        x = min(max(p - t * w, a), b)
        free = (x > a) & (x < b)
        w = w if free else 0.0
        index[kept] = k
        kept += keep
        value += x
        gone += 0.0 if keep else p if free else x
        slope += w
        gone_slope += 0.0 if keep else w
    return kept, value, slope, gone, gone_slope


@njit(cache=True, error_model="numpy")
def _pivot_breakpoint(draw, low, high, kept, index, point, weight, lower, upper):
    """A breakpoint of the candidate that ``draw`` picks, inside (low, high) if it has one there."""
    k = index[draw % kept]
    w = weight[k] if weight.shape[0] else 1.0
    first = (point[k] - upper[k]) / w
    return first if low < first < high else (point[k] - lower[k]) / w


@njit(cache=True)
def _between(low, high):
    """A number between two, of which one may be infinite."""
    if low == -np.inf:
        return high - (1.0 + abs(high))
    return low + (1.0 + abs(low)) if high == np.inf else 0.5 * low + 0.5 * high


@njit(cache=True, error_model="numpy")
def multiplier(point, weight, lower, upper, total, index):
    """A t with sum(clip(point - t weight, lower, upper)) = total, nearly; expected O(n).

    The sum falls in t and is linear between breakpoints. Newton's method inside a bracket, on the candidates alone:
    the coordinates that have a breakpoint in the bracket. Where three passes do not halve them, the next t is a
    breakpoint of one of them, drawn. An empty weight means ones; weights are positive, ``index`` (n,) is overwritten.
    Where no t reaches the total, every coordinate is at the bound nearest to it for the t returned.
    """
    low, high, t = -np.inf, np.inf, 0.0
    settled, settled_slope, before = 0.0, 0.0, 0.0  # the sum of those dropped is settled - t settled_slope
    count = point.shape[0]
    goal, missed, draw = count // 2, 0, 1
    for k in range(count):
        index[k] = k
    while True:
        count, value, slope, gone, gone_slope = _split(t, low, high, count, index, point, weight, lower, upper)
        slope += settled_slope
        excess = (settled - t * settled_slope) + value - total
        settled += gone
        settled_slope += gone_slope
        if count == 0 or excess == 0 or (slope > 0 and abs(excess) <= SOLVED * before):
            break
        before = abs(excess)
        low, high = (t, high) if excess > 0 else (low, t)
        after = t + excess / slope if slope > 0 else t
        missed = missed + 1 if count > goal else 0
        goal = goal if missed else count // 2
        if missed > PATIENCE or not low < after < high:
            draw = (draw * 1103515245 + 12345) % 2147483648
            after, missed = _pivot_breakpoint(draw, low, high, count, index, point, weight, lower, upper), 0
        if not low < after < high:  # of a candidate that the new bracket drops
            after = _between(low, high)
            if not low < after < high:  # the ends have met
                return t
        t = after
    if slope > 0:  # the direct formula loses nothing to a t much larger than the answer
        t = min(max((settled - total) / settled_slope if count == 0 else t + excess / slope, low), high)
    return t


@njit(cache=True)
def _excess(point, weight, lower, upper, total):
    """What clip(point, lower, upper) is worth beyond the total, with the rounding errors carried along.

    Returns (excess, sum of magnitudes, slope, whether some coordinate can fall, can rise).
    """
    now, error, size, slope = -total, 0.0, abs(total), 0.0
    falls = rises = False
    for k in range(point.shape[0]):
        v = min(max(point[k], lower[k]), upper[k])
        fall, rise = v > lower[k], v < upper[k]
        falls, rises = falls | fall, rises | rise
        slope += (weight[k] if weight.shape[0] else 1.0) if fall & rise else 0.0
        after = now + v
        part = after - now
        error += (now - (after - part)) + (v - part)
        now = after
        size += abs(v)
    return now + error, size, slope, falls, rises


@njit(cache=True)
def _scale(v, weight, lower, upper, point, slope, lo, up):
    """The variables weight * x, whose plain sum is the weighted one."""
    for k in range(v.shape[0]):
        a = weight[k]
        point[k] = a * np.float64(v[k])
        slope[k] = a * a
        b, c = a * lower[k], a * upper[k]
        lo[k], up[k] = (b, c) if a > 0 else (c, b)


@njit(cache=True, error_model="numpy")
def _unscale(point, weight, lo, up, lower, upper, out):
    """Back from weight * x; what is at a bound is that bound."""
    for k in range(point.shape[0]):
        a = weight[k] if weight.shape[0] else 1.0
        x = point[k] / a
        x = (lower[k] if a > 0 else upper[k]) if point[k] <= lo[k] else x
        x = (upper[k] if a > 0 else lower[k]) if point[k] >= up[k] else x
        out[k] = min(max(x, lower[k]), upper[k])


@njit(cache=True, error_model="numpy")
def project_row(point, slope, lo, up, total, slop, index):
    """Subtract a multiplier times slope from the point so that its sum between the bounds is the total.

    What rounding has left of the multiplier is found from the point where it has been subtracted, until the sum is
    right to rounding: so one much larger than x costs no accuracy. Returns False where the total is out of reach.
    """
    t = multiplier(point, slope, lo, up, total, index)
    for _ in range(8):
        for k in range(point.shape[0]):
            point[k] -= t * (slope[k] if slope.shape[0] else 1.0)
        excess, size, rate, falls, rises = _excess(point, slope, lo, up, total)
        if abs(excess) <= 2 * EPS * size:
            return True
        if abs(excess) <= NEAR * size and rate > 0:
            t = excess / rate
        else:
            t = multiplier(point, slope, lo, up, total, index)
    return abs(excess) <= slop * size or bool(falls if excess > 0 else rises)


@njit(cache=True)
def project_rows(V, weight, lower, upper, totals, slop, out, scratch, index):
    """Project every row of V onto sum(weight x) = total, lower <= x <= upper; returns the first infeasible row, or -1.

    lower and upper (float64) have one row for all or one each; an empty weight means ones. ``slop``: the relative
    miss of a total that passes for rounding. ``scratch`` has a row of n, with weights four; ``index`` n entries.
    """
    scaled = weight.shape[0] > 0
    point = scratch[0]
    slope, lo, up = (scratch[1], scratch[2], scratch[3]) if scaled else (weight, point, point)
    for r in range(V.shape[0]):
        below, above = lower[r if lower.shape[0] > 1 else 0], upper[r if upper.shape[0] > 1 else 0]
        if scaled:
            _scale(V[r], weight, below, above, point, slope, lo, up)
        else:
            point[:] = V[r]
            lo, up = below, above
        if not project_row(point, slope, lo, up, totals[r], slop, index):
            return r
        _unscale(point, weight, lo, up, below, above, out[r])
    return -1


@njit(cache=True)
def _keep_above(source, top, t, work):
    """The entries of source - top above t go to the front of work (which may be the source, with top = 0).

    Returns how many they are and their sum; four sums at a time, since each waits for the last.
    """
    kept, n = 0, source.shape[0]
    a = b = c = d = 0.0
    whole = n - n % 4
    for k in range(0, whole, 4):
        e, f = np.float64(source[k]) - top, np.float64(source[k + 1]) - top
        g, h = np.float64(source[k + 2]) - top, np.float64(source[k + 3]) - top
        work[kept] = e
        kept += e > t
        work[kept] = f
        kept += f > t
        work[kept] = g
        kept += g > t
        work[kept] = h
        kept += h > t
        a += e if e > t else 0.0
        b += f if f > t else 0.0
        c += g if g > t else 0.0
        d += h if h > t else 0.0
    for k in range(whole, n):
        e = np.float64(source[k]) - top
        work[kept] = e
        kept += e > t
        a += e if e > t else 0.0
    return kept, (a + b) + (c + d)


@njit(cache=True)
def _simplex_threshold(v, top, total, work):
    """The t with sum(max(v - top - t, 0)) = total > 0, where top is the largest entry.

    Michelot's passes, which come from below; pivots where these crawl. Returns (t, what rounding has left of it):
    x = ((v - top) - t) - rest.
    """
    kept, mass = _keep_above(v, top, -total, work)
    budget = BUDGET * v.shape[0]
    while True:
        count, t = kept, (mass - total) / kept
        kept, mass = _keep_above(work[:count], 0.0, t, work)
        budget -= count
        if kept == count:
            break
        if budget < 0:
            none = np.full(kept, np.inf)
            t = multiplier(work[:kept], work[:0], np.zeros(kept), none, total, np.empty(kept, np.int64))
            kept, _ = _keep_above(work[:kept], 0.0, t, work)
            break
    rest, error = -total, 0.0
    for c in range(kept):
        x = work[c] - t
        after = rest + x
        part = after - rest
        error += (rest - (after - part)) + (x - part)
        rest = after
    return t, (rest + error) / kept


@njit(cache=True)
def _largest(v):
    """Four maxima at a time, since each waits for the last."""
    a = b = c = d = v[0]
    whole = v.shape[0] - v.shape[0] % 4
    for k in range(0, whole, 4):
        a = v[k] if v[k] > a else a
        b = v[k + 1] if v[k + 1] > b else b
        c = v[k + 2] if v[k + 2] > c else c
        d = v[k + 3] if v[k + 3] > d else d
    for k in range(whole, v.shape[0]):
        a = v[k] if v[k] > a else a
    return max(max(a, b), max(c, d))


@njit(cache=True)
def simplex_rows(V, totals, out, work):
    """Project every row of V onto x >= 0, sum(x) = total, exactly and in expected O(n).

    Entries are taken relative to the largest one: only those above it minus the total can be positive, and what
    rounding does is then relative to x. ``work`` has n entries.
    """
    for r in range(V.shape[0]):
        v, total = V[r], totals[r]
        top = np.float64(_largest(v))
        t, rest = _simplex_threshold(v, top, total, work) if total > 0 else (0.0, 0.0)
        for k in range(V.shape[1]):
            x = ((np.float64(v[k]) - top) - t) - rest
            out[r, k] = x if x > 0 else 0.0
