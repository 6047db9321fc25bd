"""Hutchinson's estimator of the diagonal of a Hessian: unbiased, one Hessian-vector product a probe.

For losses without a likelihood; where the loss is one, `gauss_newton_bartlett` needs one gradient, never
turns negative, and asks for no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core.precision import accumulator
from jaxnum.curvature import arguments, products
from kernels_pallas import checks

PyTree = Any

_PROBES = {"rademacher": jax.random.rademacher, "normal": jax.random.normal}


class HutchinsonState(NamedTuple):
    """State of `hutchinson`."""

    count: jax.Array  # [] int32, estimates made so far; the next one draws from fold_in(key, count)


def hutchinson(
    key: jax.Array, *, num_probes: int = 1, probe: str = "rademacher", mode: str = "auto"
) -> optax.GradientTransformationExtraArgs:
    """Estimate the diagonal of the Hessian of a scalar function by random probes.

    With probes u, E[u uᵀ] = I, the estimate u * (H u) has mean diag(H). Entry i has variance
    sum over j != i of H_ij² for signs, and twice H_ii² more for Gaussian probes: signs are the default, and
    with them one probe is exact on a diagonal Hessian. (Sophia's paper draws Gaussian probes.)

    `update(updates, state, params, *, obj_fn)` ignores `updates` and returns the estimate at `params`.

    Args:
      key: [] typed random key. Estimate number n draws from `fold_in(key, n)`, so a resumed run repeats
        nothing and the state is one integer.
      num_probes: how many probes to average, at least 1. They run one after the other, in constant memory.
      probe: "rademacher" (signs) or "normal".
      mode: how H u is formed. "forward" is forward over reverse, d/dt grad f(params + t u). "reverse" is
        reverse over reverse, grad of <grad f, u>. "auto" takes "forward", and "reverse" where something
        inside `obj_fn` refuses forward mode, as the backward pass of a custom_vjp kernel does; both give the
        same product, so the choice, made while tracing, never changes the estimate beyond rounding.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` takes
        obj_fn: params -> [] floating, the function whose curvature is asked, with the batch closed over,
      and returns a tree like `params`, each leaf in at least float32.

    Raises:
      ValueError: an option is out of range; at update, `params` or `obj_fn` is missing.
      DtypeError: `key` is not a typed key; at update, a leaf of `params` is not real floating-point.
      ShapeError: `key` is an array of keys; at update, `obj_fn` does not return a scalar.
      NotImplementedError: at update, when no mode can differentiate `obj_fn` twice.

    Cost: one Hessian-vector product a probe, about two gradients in mode "forward" and three in mode
    "reverse".

    Numerics: H u is formed in the dtype of `params`, the product with u and the mean over probes in float32
    at least. Under `jax.jit` with sharded arrays the estimate is that of the global function; under
    `shard_map` average it over replicas. Inside `optax.masked` or `optax.multi_transform`, `obj_fn` is called
    with the masked tree and has to fill in the leaves it lacks.

    Source: M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; C. Bekas,
    E. Kokiopoulou, Y. Saad, "An estimator for the diagonal of a matrix", 2007, eq. 3; as Algorithm 1 of H.
    Liu et al., "Sophia", 2023, arXiv 2305.14342.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scales = jnp.array([1.0, 2.0, 3.0])
      >>> estimator = hutchinson(jax.random.key(0))
      >>> x = jnp.zeros(3)
      >>> quadratic = lambda x: 0.5 * jnp.sum(scales * x**2)
      >>> estimate, state = estimator.update(x, estimator.init(x), x, obj_fn=quadratic)
      >>> estimate.tolist()
      [1.0, 2.0, 3.0]
    """
    arguments.typed_key("hutchinson", key)
    checks.value("hutchinson", "num_probes", num_probes >= 1, "be at least 1", num_probes)
    checks.choice("hutchinson", "probe", probe, tuple(_PROBES))
    checks.choice("hutchinson", "mode", mode, products.MODES)

    def init(params: PyTree) -> HutchinsonState:
        arguments.parameters("hutchinson", params)
        return HutchinsonState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree,
        state: HutchinsonState,
        params: PyTree = None,
        *,
        obj_fn: Callable[[PyTree], jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, HutchinsonState]:
        del updates, extra_args
        arguments.parameters("hutchinson", params)
        objective = arguments.required("hutchinson", "obj_fn", obj_fn, "lambda params: loss(params, batch)")
        drawn = jax.random.split(jax.random.fold_in(key, state.count), num_probes)

        def add_probe(total: PyTree, probe_key: jax.Array) -> tuple[PyTree, None]:
            estimate = _one_probe(objective, params, probe_key, probe, mode)
            return jax.tree.map(jnp.add, total, estimate), None

        estimate = _one_probe(objective, params, drawn[0], probe, mode)
        if num_probes > 1:
            estimate, _ = jax.lax.scan(add_probe, estimate, drawn[1:])
            estimate = jax.tree.map(lambda x: x / num_probes, estimate)
        return estimate, HutchinsonState(count=jnp.asarray(optax.safe_increment(state.count)))

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _one_probe(obj_fn: Callable, params: PyTree, key: jax.Array, probe: str, mode: str) -> PyTree:
    """The estimate u * (H u) of one probe, in at least float32."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    vector = treedef.unflatten(
        # Drawn in float32 at least, then rounded: the tangent must have the dtype of its parameter.
        [_PROBES[probe](k, p.shape, accumulator(p.dtype)).astype(p.dtype) for k, p in zip(keys, leaves, strict=True)]
    )
    remedy = "or gauss_newton_bartlett"
    product = products.hessian_vector("hutchinson", "obj_fn", obj_fn, params, vector, mode, remedy)
    return jax.tree.map(lambda u, h: u.astype(accumulator(u.dtype)) * h.astype(accumulator(h.dtype)), vector, product)
