"""Attention by hand between a slow and a fast memory, every word counted: the oracle of the I/O model.

`FastMemory` holds NumPy arrays. What is loaded, stored or made in it counts, and more than it has room for raises. The
schedules below are written as loops over tiles of true size: the last tile of a length that no block divides is short,
and no padding is ever moved. Single numbers (a maximum, a factor) live in registers and are not counted.
"""

import numpy as np


class OutOfFastMemory(RuntimeError):
    """More words would be resident than the fast memory has."""


class FastMemory:
    """A memory of `words` words; arrays in it go by name."""

    def __init__(self, words):
        self.words = words
        self.tiles = {}
        self.loaded = self.stored = self.peak = self.products = 0

    def _put(self, name, value):
        assert name not in self.tiles, f"{name} is already there"
        self.tiles[name] = value
        resident = sum(tile.size for tile in self.tiles.values())
        self.peak = max(self.peak, resident)
        if resident > self.words:
            raise OutOfFastMemory(f"{name}: {resident} words in a memory of {self.words}")
        return value

    def load(self, name, slow):
        """Copy a tile of an array in slow memory."""
        self.loaded += slow.size
        return self._put(name, np.array(slow))

    def make(self, name, shape, value=0.0):
        """A tile that is computed here; it costs room and moves nothing."""
        return self._put(name, np.full(shape, value))

    def store(self, name, slow):
        """Copy a tile to its place in slow memory, and forget it."""
        tile = self.tiles.pop(name)
        self.stored += tile.size
        slow[...] = tile

    def drop(self, *names):
        for name in names:
            del self.tiles[name]

    def product(self, a, b):
        """A matrix product; its flops are counted, its result goes where the caller has room for it."""
        self.products += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b


def cut(length, block):
    """Slices of at most `block`."""
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def visible(T, S, causal=False, window=None, q_offset=0):
    """Which keys each query sees, [T, S], by the definition of `kernels_pallas.attention`."""
    i, j = np.arange(T)[:, None] + q_offset, np.arange(S)[None]
    left, right = window or (None, None)
    seen = np.ones((T, S), bool)
    if causal:
        seen &= j <= i
    if left is not None:
        seen &= j >= i - left
    if right is not None:
        seen &= j <= i + right
    return seen


def dense(q, k, v, seen):
    """Output and log-sum-exp; rows that see nothing give 0 and -inf."""
    s = np.where(seen, q @ k.T, -np.inf)
    m = np.max(s, axis=1, keepdims=True)
    p = np.where(seen, np.exp(s - np.where(np.isfinite(m), m, 0)), 0)
    l = p.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.where(np.isfinite(m), m, 0) + np.log(l))[:, 0]
    return (p / np.where(l == 0, 1, l)) @ v, lse


def dense_gradients(q, k, v, o, do, lse, seen):
    """dq, dk and dv of sum(do o)."""
    p = np.where(seen, np.exp(q @ k.T - np.where(np.isfinite(lse), lse, 0)[:, None]), 0)
    ds = p * (do @ v.T - np.sum(do * o, axis=1, keepdims=True))
    return ds @ k, ds.T @ q, p.T @ do


def flash(memory, q, k, v, seen, block_q, block_kv):
    """A block of queries stays, all blocks of keys that it sees pass by; the statistics are folded in row by row."""
    T, d = q.shape
    S, dv = v.shape
    o, lse = np.full((T, dv), np.nan), np.full(T, np.nan)
    for rows in cut(T, block_q):
        n = rows.stop - rows.start
        Q = memory.load("q", q[rows])
        O, m, l = memory.make("o", (n, dv)), memory.make("m", n, -np.inf), memory.make("l", n)
        for columns in cut(S, block_kv):
            if not seen[rows, columns].any():
                continue
            K, V = memory.load("k", k[columns]), memory.load("v", v[columns])
            s = memory.make("s", (n, columns.stop - columns.start))
            s[...] = np.where(seen[rows, columns], memory.product(Q, K.T), -np.inf)
            for r in range(n):
                top = max(m[r], s[r].max())
                if top == -np.inf:
                    s[r] = 0
                    continue
                shrink = np.exp(m[r] - top)
                s[r] = np.exp(s[r] - top)
                m[r], l[r], O[r] = top, shrink * l[r] + s[r].sum(), shrink * O[r]
            O += memory.product(s, V)
            memory.drop("k", "v", "s")
        for r in range(n):
            m[r] = m[r] + np.log(l[r]) if l[r] else -np.inf
            O[r] /= l[r] or 1
        memory.drop("q", "l")
        memory.store("o", o[rows])
        memory.store("m", lse[rows])
    return o, lse


def small_cache(memory, q, k, v, seen, tile):
    """The scores are written out, in square tiles whose sums over the head dimension stay; then come back twice."""
    T, d = q.shape
    S, dv = v.shape
    o, lse, scores = np.full((T, dv), np.nan), np.full(T, np.nan), np.full((T, S), np.nan)
    live = [(r, [c for c in cut(S, tile) if seen[r, c].any()]) for r in cut(T, tile)]
    for rows, columns_of_row in live:  # s = q k^T
        for columns in columns_of_row:
            s = memory.make("s", (rows.stop - rows.start, columns.stop - columns.start))
            for depth in cut(d, tile):
                Q, K = memory.load("q", q[rows, depth]), memory.load("k", k[columns, depth])
                s += memory.product(Q, K.T)
                memory.drop("q", "k")
            s[~seen[rows, columns]] = -np.inf
            memory.store("s", scores[rows, columns])
    for rows, columns_of_row in live:  # lse
        n = rows.stop - rows.start
        m, l = memory.make("m", n, -np.inf), memory.make("l", n)
        for columns in columns_of_row:
            s = memory.load("s", scores[rows, columns])
            for r in range(n):
                top = max(m[r], s[r].max())
                if top > -np.inf:
                    m[r], l[r] = top, np.exp(m[r] - top) * l[r] + np.exp(s[r] - top).sum()
            memory.drop("s")
        for r in range(n):
            m[r] = m[r] + np.log(l[r]) if l[r] else -np.inf
        memory.drop("l")
        memory.store("m", lse[rows])
    for rows, columns_of_row in live:  # o = exp(s - lse) v
        n = rows.stop - rows.start
        norm = memory.load("lse", lse[rows])
        for depth in cut(dv, tile):
            O = memory.make("o", (n, depth.stop - depth.start))
            for columns in columns_of_row:
                s, V = memory.load("s", scores[rows, columns]), memory.load("v", v[columns, depth])
                for r in range(n):
                    s[r] = np.exp(s[r] - norm[r]) if norm[r] > -np.inf else 0
                O += memory.product(s, V)
                memory.drop("s", "v")
            memory.store("o", o[rows, depth])
        memory.drop("lse")
    return o, lse


def flash_backward(memory, q, k, v, o, do, lse, seen, block_q, block_kv):
    """delta, then dq with a block of queries resident, then dk and dv with a block of keys resident."""
    T, d = q.shape
    S, dv = v.shape
    delta, dq, dk, dv_ = (np.full(x.shape, np.nan) for x in (lse, q, k, v))
    for rows in cut(T, block_q):
        O, dO = memory.load("o", o[rows]), memory.load("do", do[rows])
        memory.make("delta", rows.stop - rows.start)[...] = np.sum(O * dO, axis=1)
        memory.drop("o", "do")
        memory.store("delta", delta[rows])

    def tiles(rows, columns):
        """p and ds of one tile, from what is resident."""
        at = memory.tiles
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        p, ds = memory.make("p", shape), memory.make("ds", shape)
        p[...] = memory.product(at["q"], at["k"].T)
        ds[...] = memory.product(at["do"], at["v"].T)
        for r in range(shape[0]):
            norm = at["lse"][r]
            p[r] = np.where(seen[rows, columns][r], np.exp(p[r] - norm), 0) if norm > -np.inf else 0
            ds[r] = p[r] * (ds[r] - at["delta"][r])
        return p, ds

    queries, keys = {"q": q, "do": do, "lse": lse, "delta": delta}, {"k": k, "v": v}
    for rows in cut(T, block_q):
        for name, x in queries.items():
            memory.load(name, x[rows])
        dQ = memory.make("dq", (rows.stop - rows.start, d))
        for columns in cut(S, block_kv):
            if not seen[rows, columns].any():
                continue
            for name, x in keys.items():
                memory.load(name, x[columns])
            _, ds = tiles(rows, columns)
            dQ += memory.product(ds, memory.tiles["k"])
            memory.drop("p", "ds", *keys)
        memory.drop(*queries)
        memory.store("dq", dq[rows])
    for columns in cut(S, block_kv):
        for name, x in keys.items():
            memory.load(name, x[columns])
        n = columns.stop - columns.start
        dK, dV = memory.make("dk", (n, d)), memory.make("dv", (n, dv))
        for rows in cut(T, block_q):
            if not seen[rows, columns].any():
                continue
            for name, x in queries.items():
                memory.load(name, x[rows])
            p, ds = tiles(rows, columns)
            dV += memory.product(p.T, memory.tiles["do"])
            dK += memory.product(ds.T, memory.tiles["q"])
            memory.drop("p", "ds", *queries)
        memory.drop(*keys)
        memory.store("dk", dk[columns])
        memory.store("dv", dv_[columns])
    return dq, dk, dv_
