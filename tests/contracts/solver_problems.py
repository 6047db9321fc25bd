"""The problems the solver contract is tried on: one case per problem class, shared by all its solvers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxnum
from jaxnum import FixedPoint, Linear, Status


class Case:
    """What the contract asks of a case; the defaults fit a solution that is isolated."""

    condition = 10.0
    second_order = True
    batchable = True
    unrolled_converges = True
    check_every = 1

    def observe(self, params: Any, x: Any) -> Any:
        """The part of x that is compared."""
        return x

    def gauge(self, params: Any, x: Any) -> Any:
        return x

    def detached(self, params: Any) -> Any:
        return jax.lax.stop_gradient(params)

    def directions(self, params: Any) -> list[Any]:
        """Two directions: everything, and one leaf alone."""
        rng = np.random.default_rng(5)
        leaves, treedef = jax.tree.flatten(params)
        everywhere = [jnp.asarray(rng.normal(size=np.shape(leaf)), leaf.dtype) for leaf in leaves]
        alone = [v if i == len(leaves) - 1 else jnp.zeros_like(v) for i, v in enumerate(everywhere)]
        return [jax.tree.unflatten(treedef, d) for d in (everywhere, alone)]

    def place(self, params: Any, mesh: Any) -> Any:
        """Shard every vector, replicate the rest."""

        def put(leaf: Any) -> Any:
            spec = PartitionSpec("i") if np.ndim(leaf) == 1 else PartitionSpec()
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(put, params)


class ContractionCase(Case):
    """x = T(x): a coupled leaf, and a leaf that no parameter perturbs."""

    def params(self, dtype: str, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        M = rng.normal(size=(3, 3))
        M *= (0.3 + 0.1 * seed) / np.linalg.norm(M, 2)
        return {"M": jnp.asarray(M, dtype), "c": jnp.asarray(rng.normal(size=3), dtype)}

    def problem(self, params: Any) -> FixedPoint:
        c = params["c"]  # captured, not passed

        def T(x: Any, M: Any) -> Any:
            return {"u": jnp.tanh(M @ x["u"] + c) + 0.1 * jnp.sum(x["v"]), "v": 0.5 * x["v"] + 1}

        # Under vmap the problem itself is batched, so everything goes through `args` there.
        if isinstance(c, jax.core.Tracer):
            return FixedPoint(_captured_map, (params["M"], c))
        return FixedPoint(T, (params["M"],))

    def start(self, params: Any) -> Any:
        return {"u": jnp.zeros_like(params["c"]), "v": jnp.zeros_like(params["c"][:2])}

    def reference(self, params: Any) -> Any:
        M, c = (np.asarray(params[k], np.float64) for k in ("M", "c"))
        u = np.zeros(3)
        for _ in range(400):
            u = np.tanh(M @ u + c) + 0.4
        return {"u": u, "v": np.full(2, 2.0)}

    def failures(self, params: Any) -> dict:
        problem, x0 = self.problem(params), self.start(params)
        expanding = FixedPoint(lambda x: jax.tree.map(lambda leaf: 1e30 * (leaf + 1) ** 3, x))
        out = {
            Status.max_steps: (problem, x0, {"max_steps": 2}),
            Status.nonfinite: (expanding, x0, {"max_steps": 1000}),
        }
        # Rounding holds the residual of this map between zero and the tolerance for ever.
        rough = FixedPoint(lambda x: jax.tree.map(lambda v: 3.0 - 1e-15 * jnp.sign(v - 3.0) * 4 - 0.3 * (v - 3.0), x))
        out[Status.stagnated] = (rough, x0, {"rtol": 1e-30, "atol": 0.0, "max_steps": 5000})
        return out

    def poisoned(self, params: Any) -> Any:
        """NaN as soon as an iterate exceeds one half."""
        T = lambda x: jnp.where(jnp.max(x) > 0.5, jnp.nan, 0.9 * x + 0.1)  # noqa: E731
        return FixedPoint(T), jnp.zeros(3)

    def sharded_params(self, dtype: str) -> Any:
        return {"c": jnp.linspace(0.1, 0.9, 4, dtype=dtype)}

    def sharded_solve(self, solver: Any, params: Any, options: Any) -> Any:
        c = params["c"]
        T = lambda x: {"u": 0.4 * jnp.cos(x["u"]) + c}  # noqa: E731
        return jaxnum.solve(solver, {"u": jnp.zeros_like(c)}, FixedPoint(T), on_failure="return", **options)


def _captured_map(x: Any, M: Any, c: Any) -> Any:
    return {"u": jnp.tanh(M @ x["u"] + c) + 0.1 * jnp.sum(x["v"]), "v": 0.5 * x["v"] + 1}


class LinearCase(Case):
    """A x = b with a function A on a tree, a captured matrix, and a block that no parameter of the test perturbs."""

    condition = 30.0
    # Exact termination in a few steps leaves nothing to unroll smoothly beyond; the steps themselves are exact.
    unrolled_converges = True

    def params(self, dtype: str, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        G = rng.normal(size=(5, 5))
        return {"G": jnp.asarray(G, dtype), "b": jnp.asarray(rng.normal(size=5), dtype)}

    @staticmethod
    def matrix(params: Any) -> Any:
        G = params["G"]
        return G @ G.T / 5 + jnp.eye(5, dtype=G.dtype)

    def problem(self, params: Any) -> Linear:
        M = self.matrix(params)
        A = lambda v: {"u": M @ v["u"], "v": 2 * v["v"]}  # noqa: E731
        b = {"u": params["b"], "v": jnp.ones((2,), params["b"].dtype)}
        if isinstance(params["b"], jax.core.Tracer):
            b = params["b"]
            return Linear(M, b)
        return Linear(A, b)

    def start(self, params: Any) -> Any:
        if isinstance(params["b"], jax.core.Tracer):
            return jnp.zeros_like(params["b"])
        return {"u": jnp.zeros_like(params["b"]), "v": jnp.zeros((2,), params["b"].dtype)}

    def observe(self, params: Any, x: Any) -> Any:
        return x["u"] if isinstance(x, dict) else x

    def reference(self, params: Any) -> Any:
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        return np.linalg.solve(p["G"] @ p["G"].T / 5 + np.eye(5), p["b"])

    def failures(self, params: Any) -> dict:
        M, b = self.matrix(params), params["b"]
        x0 = jnp.zeros_like(b)
        Q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 30)))
        hard = jnp.asarray(Q * np.geomspace(1, 1e4, 30) @ Q.T)
        hard = (hard + hard.T) / 2
        return {
            Status.max_steps: (Linear(M, b), x0, {"max_steps": 1}),
            Status.nonfinite: (Linear(M.at[0, 0].set(jnp.nan), b), x0, {}),
            Status.breakdown: (Linear(-M, b), x0, {}),
            Status.stagnated: (Linear(hard, jnp.ones(30)), jnp.zeros(30), {"rtol": 1e-17}),
        }

    def poisoned(self, params: Any) -> Any:
        M, b = self.matrix(params), params["b"]
        A = lambda v: jnp.where(jnp.sum(v * b) < 0.5 * jnp.sum(b * b), jnp.nan, M @ v)  # noqa: E731
        return Linear(A, b), b

    def sharded_params(self, dtype: str) -> Any:
        return {"b": jnp.linspace(0.1, 0.9, 4, dtype=dtype), "d": jnp.linspace(1, 2, 4, dtype=dtype)}

    def sharded_solve(self, solver: Any, params: Any, options: Any) -> Any:
        d, b = params["d"], params["b"]
        A = lambda v: d * v + 0.1 * jnp.sum(v)  # noqa: E731
        return jaxnum.solve(solver, jnp.zeros_like(b), Linear(A, b), on_failure="return", **options)
