"""What each dtype can carry: accumulators, default tolerances, the smallest residual worth asking for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_DEFAULT_RTOL = {2: 1e-2, 4: 1e-5, 8: 1e-8}


def accumulator(dtype: Any) -> np.dtype:
    """The dtype in which sums over arrays of `dtype` are kept: float32 for anything shorter, else `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


def coarsest(tree: Any) -> np.dtype:
    """The real dtype of fewest bits among the inexact leaves of a tree; it bounds what a solve can reach."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
    reals = [jnp.finfo(d).dtype for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    return min(reals, key=lambda d: d.itemsize) if reals else jnp.dtype(jnp.float32)


def default_rtol(tree: Any) -> float:
    """Relative tolerance of a solve whose caller names none: 1e-8 in float64, 1e-5 in float32, 1e-2 below."""
    return _DEFAULT_RTOL[coarsest(tree).itemsize]


def attainable(tree: Any) -> float:
    """Four units of rounding: no residual relative to its scale can be trusted below this."""
    return 4.0 * float(jnp.finfo(coarsest(tree)).eps)
