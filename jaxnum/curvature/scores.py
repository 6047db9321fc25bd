"""Scores of a likelihood at labels drawn from the model itself."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import checks


def check_logits(function: str, logits: Any) -> None:
    """Check that logits are floating-point and end in an axis of classes.

    Raises:
      DtypeError: they are not floating-point.
      ShapeError: they are a scalar.
    """
    remedy = "Logits end in the axis of classes."
    checks.dtype(function, "floating", remedy=remedy, **{"logits_fn(params)": logits})
    checks.shape(function, remedy=remedy, **{"logits_fn(params)": (logits, "*B K")})


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """d/dz of the cross-entropy at a label drawn from the model: softmax(z) - onehot(y)."""
    label = jax.random.categorical(key, logits, axis=-1)
    return jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)


def _gaussian(key: jax.Array, logits: jax.Array) -> jax.Array:
    """d/dz of 0.5 |z - y|² at y = z + noise: minus the noise, whose sign does not matter to its law."""
    return jax.random.normal(key, logits.shape, logits.dtype)


SCORES = {"categorical": _categorical, "gaussian": _gaussian}
