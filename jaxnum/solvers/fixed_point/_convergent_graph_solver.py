"""The convergent graph solver: a layer whose output is the fixed point of a contraction on a graph.

Cost: one pass over the edges a step, log(tolerance) / log(gamma) steps. Source: Park, Choo & Park 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core.problems import FixedPoint
from jaxnum.core.solver import Solution, drive
from jaxnum.solvers.fixed_point._picard import picard
from kernels_pallas import checks


def convergent_graph_solver(
    weights: jax.Array,
    b: jax.Array,
    senders: jax.Array,
    receivers: jax.Array,
    *,
    gamma: float | jax.Array = 0.5,
    activation: Callable | None = None,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int | None = None,
    on_failure: str = "raise",
) -> Solution:
    """The states x with x_i = phi(gamma sum_{edges i -> j} w_ij x_j + b_i), one system for each head.

    With weights of `convergent_graph_solver_weights` the sums over the edges that leave a node are at most 1, so that
    the map contracts by gamma in the largest entry, whatever the graph: one solution, which a layer may rely on.
    Values travel against the edges, from where they lead to where they start, as in value iteration.

    Args:
      weights: [edges, heads] floating point, >= 0, sums over the edges that leave a node at most 1.
      b: [nodes, heads], same dtype.
      senders: int [edges], where each edge starts.
      receivers: int [edges], where it leads.
      gamma: real scalar in (0, 1).
      activation: phi, a nonexpansive function of arrays such as jnp.tanh or jax.nn.relu; None is the identity.
      rtol: as for `jaxnum.fixed_point`.
      atol: as for `jaxnum.fixed_point`.
      max_steps: as for `jaxnum.fixed_point`; gamma near 1 needs log(tolerance) / log(gamma).
      on_failure: as for `jaxnum.fixed_point`.

    Returns:
      A `jaxnum.Solution` whose x is [nodes, heads]. Weights that do not contract end in `max_steps` or `nonfinite`,
      senders and receivers outside the graph in `nonfinite`.

    Raises:
      ValueError: gamma outside (0, 1). ShapeError, DtypeError: arrays that do not fit.
      SolverError: an eager call that did not converge.

    Derivatives: implicit, with respect to weights, b and gamma: no step is kept.

    Source: Park, Choo & Park, "Convergent graph solvers" (ICLR 2022), equations 4 to 8.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnum.solvers import convergent_graph_solver
      >>> start, end = jnp.array([0, 1]), jnp.array([1, 2])  # a path of three nodes
      >>> out = convergent_graph_solver(jnp.ones((2, 1)), jnp.array([[0.0], [0.0], [8.0]]), start, end)
      >>> out.x[:, 0].tolist()
      [2.0, 4.0, 8.0]
    """
    name = "convergent_graph_solver"
    checks.shape(name, weights=(weights, "E H"), b=(b, "N H"), senders=(senders, "E"), receivers=(receivers, "E"))
    checks.dtype(name, "floating", weights=weights, b=b)
    checks.dtype(name, "integer", senders=senders, receivers=receivers)
    checks.same_dtype(name, weights=weights, b=b)
    if not checks.traced(gamma):
        checks.value(name, "gamma", 0 < float(gamma) < 1, "be in (0, 1)", gamma)
    arguments = (weights, b, senders, receivers, jnp.asarray(gamma, b.dtype))
    return drive(
        name,
        picard(),
        b,
        FixedPoint(_plain if activation is None else partial(_activated, activation), arguments),
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        check_every=None,
        history=False,
        adjoint="implicit",
        checkpoint_every=None,
        progress=None,
        on_failure=on_failure,
    )


def convergent_graph_solver_weights(
    logits: jax.Array, senders: jax.Array, num_nodes: int, *, mode: str = "degree"
) -> jax.Array:
    """Edge weights whose sums over the edges that leave a node are at most 1.

    Args:
      logits: [edges, heads] floating point.
      senders: int [edges], where each edge starts.
      num_nodes: number of nodes, Python int >= 1.
      mode: "degree": clip(logits, 0, 1) / (number of edges that leave the node); "softmax" over those edges.

    Returns:
      [edges, heads], dtype of logits.

    Raises:
      ValueError: an unknown mode. ShapeError, DtypeError: arrays that do not fit.

    Source: Park, Choo & Park (ICLR 2022), section 4.1; "degree" is what their experiments use.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnum.solvers import convergent_graph_solver_weights
      >>> convergent_graph_solver_weights(jnp.array([[2.0], [0.5], [1.0]]), jnp.array([0, 0, 1]), 2)[:, 0].tolist()
      [0.5, 0.25, 1.0]
    """
    name = "convergent_graph_solver_weights"
    checks.shape(name, logits=(logits, "E H"), senders=(senders, "E"))
    checks.dtype(name, "floating", logits=logits)
    checks.dtype(name, "integer", senders=senders)
    checks.choice(name, "mode", mode, ("degree", "softmax"))
    if mode == "degree":
        degree = jax.ops.segment_sum(jnp.ones_like(logits[:, 0]), senders, num_nodes)
        return jnp.clip(logits, 0, 1) / degree[senders][:, None]
    top = jax.ops.segment_max(jax.lax.stop_gradient(logits), senders, num_nodes)
    raised = jnp.exp(logits - top[senders])
    return raised / jax.ops.segment_sum(raised, senders, num_nodes)[senders]


def _plain(
    x: jax.Array, weights: jax.Array, b: jax.Array, senders: jax.Array, receivers: jax.Array, gamma: jax.Array
) -> jax.Array:
    # Places outside the graph would be clipped, or their edges dropped.
    n = x.shape[0]
    inside = (senders >= 0) & (senders < n) & (receivers >= 0) & (receivers < n)
    weights = jnp.where(inside[:, None], weights, jnp.nan)
    return gamma * jax.ops.segment_sum(weights * x[receivers], jnp.clip(senders, 0, n - 1), n) + b


def _activated(activation: Callable, x: jax.Array, *arguments: jax.Array) -> jax.Array:
    return activation(_plain(x, *arguments))
