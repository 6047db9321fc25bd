"""The problems the solver contract is tried on: one case per problem class, shared by all its solvers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxnum
from jaxnum import DenseCost, FiniteSum, FixedPoint, Inclusion, Linear, Minimize, Status, Transport


class Case:
    """What the contract asks of a case; the defaults fit a solution that is isolated.

    A case has `params(dtype, seed)`, `problem(params)` (which captures arrays where the problem takes functions),
    `start(params)`, `reference(params)`, `failures(params)`, `poisoned(params)`, `sharded_params(dtype)` and
    `sharded_solve(solver, params, options)`.
    """

    # What the problem multiplies a residual by.
    condition = 10.0

    def observe(self, params: Any, x: Any) -> Any:
        """The part of x that is compared."""
        return x

    def gauge(self, params: Any, x: Any) -> Any:
        """What a solver that takes no step returns for x."""
        return x

    def explicit(self, params: Any) -> Any:
        """A starting point and the problem with nothing captured, so that both can be batched as pytrees."""
        return self.start(params), self.problem(params)

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
        return FixedPoint(lambda x, M: _coupled(x, M, c), (params["M"],))

    def explicit(self, params: Any) -> Any:
        return self.start(params), FixedPoint(_coupled, (params["M"], params["c"]))

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
        # The jump holds the residual of this map between zero and the tolerance for ever, at 3 too.
        rough = FixedPoint(lambda x: jax.tree.map(lambda v: 3.0 + _jump(v) - 0.3 * (v - 3.0), x))
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


def _jump(v: Any) -> Any:
    return jnp.where(v < 3.0, 4e-15, -4e-15)


def _coupled(x: Any, M: Any, c: Any) -> Any:
    return {"u": jnp.tanh(M @ x["u"] + c) + 0.1 * jnp.sum(x["v"]), "v": 0.5 * x["v"] + 1}


class LinearCase(Case):
    """A x = b with a function A on a tree, a captured matrix, and a block that no parameter of the test perturbs."""

    condition = 30.0

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
        return Linear(A, {"u": params["b"], "v": jnp.ones((2,), params["b"].dtype)})

    def start(self, params: Any) -> Any:
        return {"u": jnp.zeros_like(params["b"]), "v": jnp.zeros((2,), params["b"].dtype)}

    def explicit(self, params: Any) -> Any:
        return jnp.zeros_like(params["b"]), Linear(self.matrix(params), params["b"])

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


class NonsymmetricCase(LinearCase):
    """The same with an A that is not symmetric, and a singular system as the breakdown."""

    @staticmethod
    def matrix(params: Any) -> Any:
        G = params["G"]
        return 0.3 * G + 2 * jnp.eye(5, dtype=G.dtype)

    def problem(self, params: Any) -> Linear:
        return replace(super().problem(params), symmetric=False)

    def explicit(self, params: Any) -> Any:
        # Both blocks: without the second, a method that restarts takes another number of steps.
        A = jax.scipy.linalg.block_diag(self.matrix(params), 2 * jnp.eye(2, dtype=params["G"].dtype))
        b = jnp.concatenate([params["b"], jnp.ones((2,), params["b"].dtype)])
        return jnp.zeros_like(b), Linear(A, b, symmetric=False)

    def observe(self, params: Any, x: Any) -> Any:
        return x["u"] if isinstance(x, dict) else x[:5]

    def reference(self, params: Any) -> Any:
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        return np.linalg.solve(0.3 * p["G"] + 2 * np.eye(5), p["b"])

    def failures(self, params: Any) -> dict:
        singular = Linear(jnp.diag(jnp.array([1.0, 0.0])), jnp.ones(2), symmetric=False)
        skew = jnp.eye(30) + 0.3 * (jnp.eye(30, k=1) - jnp.eye(30, k=-1))
        return super().failures(params) | {
            Status.breakdown: (singular, jnp.zeros(2), {}),
            Status.stagnated: (Linear(skew, jnp.arange(30.0) / 7, symmetric=False), jnp.zeros(30), {"rtol": 1e-17}),
        }


class IndefiniteCase(LinearCase):
    """The same with a symmetric matrix of both signs, where only a bad preconditioner breaks a method down."""

    @staticmethod
    def matrix(params: Any) -> Any:
        return LinearCase.matrix(params) * jnp.asarray(_SIGNS, params["G"].dtype)

    def problem(self, params: Any) -> Linear:
        return replace(super().problem(params), symmetric="indefinite")

    def explicit(self, params: Any) -> Any:
        x0, problem = super().explicit(params)
        return x0, replace(problem, symmetric="indefinite")

    def reference(self, params: Any) -> Any:
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        return np.linalg.solve((p["G"] @ p["G"].T / 5 + np.eye(5)) * _SIGNS, p["b"])

    def failures(self, params: Any) -> dict:
        M, b = self.matrix(params), params["b"]
        broken = Linear(M, b, -jnp.eye(5), symmetric="indefinite")
        return super().failures(params) | {Status.breakdown: (broken, jnp.zeros_like(b), {})}


# Two diagonal blocks of opposite sign: indefinite for every positive definite matrix they are laid over.
_SIGNS = np.zeros((5, 5))
_SIGNS[:2, :2], _SIGNS[2:, 2:] = 1, -1


class TransportCase(Case):
    """Potentials in their gauge, with a point that bears no weight. Any change of the parameters keeps the masses."""

    condition = 30.0

    def __init__(self, tau_a: float = 1.0, tau_b: float = 1.0):
        self.tau = (tau_a, tau_b)

    def params(self, dtype: str, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        shapes = {"C": (5, 4), "a": (4,), "b": (4,)}
        params = {name: rng.uniform(size=shape) for name, shape in shapes.items()}
        return {name: jnp.asarray(leaf, dtype) for name, leaf in (params | {"epsilon": np.zeros(())}).items()}

    def problem(self, params: Any) -> Transport:
        a = jnp.append(jax.nn.softmax(params["a"]), 0)
        epsilon = 0.3 * jnp.exp(params["epsilon"])
        return Transport(params["C"], a, jax.nn.softmax(params["b"]), epsilon, *self.tau)

    def start(self, params: Any) -> Any:
        return jnp.zeros_like(params["C"][:, 0]), jnp.zeros_like(params["b"])

    def observe(self, params: Any, x: Any) -> Any:
        f, g = x
        return {"f": f[:-1], "g": g}

    def gauge(self, params: Any, x: Any) -> Any:
        return self.problem(params).canonical(x)

    def reference(self, params: Any) -> Any:
        """The scaling algorithm on the kernel exp(-C / epsilon), in NumPy."""
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        a, b = (np.exp(p[k]) / np.exp(p[k]).sum() for k in ("a", "b"))
        epsilon = 0.3 * np.exp(p["epsilon"])
        K = np.exp(-p["C"][:-1] / epsilon)
        u, v = np.ones(4), np.ones(4)
        for _ in range(2000):
            u = (a / (K @ v)) ** self.tau[0]
            v = (b / (K.T @ u)) ** self.tau[1]
        f, g = epsilon * np.log(u), epsilon * np.log(v)
        shift = (a @ f - b @ g) / 2 if self.tau == (1, 1) else 0.0
        return {"f": f - shift, "g": g + shift}

    def failures(self, params: Any) -> dict:
        problem, x0 = self.problem(params), self.start(params)
        C, a, b, epsilon = problem.cost.C, problem.a, problem.b, problem.epsilon
        make = lambda C, a: Transport(C, a, b, epsilon, *self.tau)  # noqa: E731
        negative = a.at[0].add(-1).at[1].add(1)
        return {
            Status.max_steps: (problem, x0, {"max_steps": 2}),
            Status.nonfinite: (make(C.at[0, 0].set(jnp.nan), a), x0, {}),
            Status.infeasible: (make(C, negative), x0, {}),
            Status.stagnated: (problem, x0, {"rtol": 1e-30}),
        }

    def poisoned(self, params: Any) -> Any:
        a = b = jnp.full((4,), 0.25)
        cost = PoisonedCost(params["C"][:-1] + jnp.arange(4.0))
        return Transport(cost, a, b, 0.3, *self.tau), (jnp.zeros(4), jnp.zeros(4))

    def sharded_params(self, dtype: str) -> Any:
        return {"C": jnp.asarray(np.random.default_rng(3).uniform(size=(4, 4)), dtype), "a": jnp.arange(1.0, 5) / 10}

    def sharded_solve(self, solver: Any, params: Any, options: Any) -> Any:
        a, b = params["a"], jnp.full((4,), 0.25)
        problem = Transport(params["C"], a, b, 0.3, *self.tau)
        return jaxnum.solve(solver, (jnp.zeros_like(a), jnp.zeros_like(b)), problem, on_failure="return", **options)


@partial(jax.tree_util.register_dataclass, data_fields=["C"], meta_fields=[])
@dataclass(frozen=True)
class PoisonedCost(DenseCost):
    """NaN as soon as a potential has moved."""

    def lse_rows(self, v: Any, epsilon: Any) -> Any:
        return jnp.where(jnp.any(v != 0), jnp.nan, super().lse_rows(v, epsilon))


class MinimizeCase(Case):
    """A convex function of two leaves, a captured vector, and a block that no parameter of the test perturbs."""

    condition = 30.0

    def params(self, dtype: str, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        return {"G": jnp.asarray(rng.normal(size=(4, 4)), dtype), "b": jnp.asarray(rng.normal(size=4), dtype)}

    def problem(self, params: Any) -> Minimize:
        b = params["b"]  # captured, not passed
        return Minimize(lambda x, G: _quartic(x, G, b), (params["G"],))

    def explicit(self, params: Any) -> Any:
        return self.start(params), Minimize(_quartic, (params["G"], params["b"]))

    def start(self, params: Any) -> Any:
        return {"u": jnp.zeros_like(params["b"]), "v": jnp.zeros_like(params["b"][:2])}

    def reference(self, params: Any) -> Any:
        """Newton's method in NumPy on the gradient written by hand."""
        G, b = (np.asarray(params[k], np.float64) for k in ("G", "b"))
        A, u = G @ G.T / 4 + np.eye(4), np.zeros(4)
        for _ in range(50):
            u = u - np.linalg.solve(A + np.diag(0.3 * u**2), A @ u + 0.1 * u**3 - b)
        return {"u": u, "v": np.ones(2)}

    def failures(self, params: Any) -> dict:
        problem, x0 = self.problem(params), self.start(params)
        unbounded = Minimize(lambda x: -jnp.sum(jnp.exp(x["u"] ** 2)))
        ones = jax.tree.map(jnp.ones_like, x0)
        return {
            Status.max_steps: (problem, x0, {"max_steps": 1}),
            Status.nonfinite: (unbounded, ones, {}),
            Status.stagnated: (problem, x0, {"rtol": 1e-30}),
        }

    def poisoned(self, params: Any) -> Any:
        """A gradient that is NaN as soon as an iterate exceeds one half, where f is finite."""
        edge = lambda x: jnp.sqrt(jnp.maximum(0.5 - jnp.max(x), 0))  # noqa: E731
        return Minimize(lambda x: jnp.sum((x - 1) ** 2) + 0.1 * edge(x)), jnp.zeros(3)

    def sharded_params(self, dtype: str) -> Any:
        return {"c": jnp.linspace(0.1, 0.9, 4, dtype=dtype)}

    def sharded_solve(self, solver: Any, params: Any, options: Any) -> Any:
        c = params["c"]
        f = lambda x: jnp.sum(jnp.cosh(x["u"] - c)) + 0.1 * jnp.sum(x["u"]) ** 2  # noqa: E731
        return jaxnum.solve(solver, {"u": jnp.zeros_like(c)}, Minimize(f), on_failure="return", **options)


def _quartic(x: Any, G: Any, b: Any) -> Any:
    u, v = x["u"], x["v"]
    w = jnp.sum(G * u[:, None], axis=0)
    return jnp.sum(w**2) / 8 + jnp.sum(u**2) / 2 + jnp.sum(u**4) / 40 - jnp.sum(b * u) + jnp.sum((v - 1) ** 2)


class InclusionCase(Case):
    """0 in F(x) + G(x): soft thresholding on a coupled leaf, some of it at zero, and a leaf that nothing perturbs."""

    def params(self, dtype: str, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        M = rng.normal(size=(3, 3))
        M *= (0.3 + 0.1 * seed) / np.linalg.norm(M, 2)
        c = rng.normal(size=3) + 2 * np.array([1, -1, 0])
        return {"M": jnp.asarray(M, dtype), "w": jnp.asarray(0.7, dtype), "c": jnp.asarray(c, dtype)}

    def problem(self, params: Any) -> Inclusion:
        c, w = params["c"], params["w"]  # captured, not passed
        resolvent = lambda x, step: {"u": _shrink(x["u"], step * w), "v": x["v"]}  # noqa: E731
        return Inclusion(lambda x, M: _monotone(x, M, c), resolvent, (params["M"],))

    def explicit(self, params: Any) -> Any:
        resolvent = lambda x, step: {"u": _shrink(x["u"], 0.7 * step), "v": x["v"]}  # noqa: E731
        return self.start(params), Inclusion(_monotone, resolvent, (params["M"], params["c"]))

    def start(self, params: Any) -> Any:
        return {"u": jnp.zeros_like(params["c"]), "v": jnp.zeros_like(params["c"][:2])}

    def reference(self, params: Any) -> Any:
        M, c, w = (np.asarray(params[k], np.float64) for k in ("M", "c", "w"))
        u = np.zeros(3)
        for _ in range(400):
            u = u - 0.5 * (u + np.tanh(M @ u) - c + 0.4)
            u = np.sign(u) * np.maximum(np.abs(u) - 0.5 * w, 0)
        return {"u": u, "v": np.full(2, 2.0)}

    def failures(self, params: Any) -> dict:
        problem, x0 = self.problem(params), self.start(params)
        undefined = Inclusion(lambda x: jax.tree.map(lambda leaf: jnp.nan * leaf, x))
        rough = Inclusion(lambda x: jax.tree.map(lambda v: 0.7 * (v - 3.0) - _jump(v), x))
        return {
            Status.max_steps: (problem, x0, {"max_steps": 2}),
            Status.nonfinite: (undefined, x0, {}),
            Status.stagnated: (rough, x0, {"rtol": 1e-30, "atol": 0.0, "max_steps": 5000}),
        }

    def poisoned(self, params: Any) -> Any:
        """NaN as soon as an iterate exceeds one half."""
        F = lambda x: jnp.where(jnp.max(x) > 0.5, jnp.nan, 0.1 * (x - 1))  # noqa: E731
        return Inclusion(F), jnp.zeros(3)

    def sharded_params(self, dtype: str) -> Any:
        return {"c": jnp.linspace(0.1, 0.9, 4, dtype=dtype)}

    def sharded_solve(self, solver: Any, params: Any, options: Any) -> Any:
        c = params["c"]
        F = lambda x: {"u": x["u"] + 0.4 * jnp.sin(x["u"]) - c}  # noqa: E731
        problem = Inclusion(F, lambda x, step: jax.tree.map(lambda leaf: jnp.clip(leaf, 0.2, 0.4), x))
        return jaxnum.solve(solver, {"u": jnp.zeros_like(c)}, problem, on_failure="return", **options)


class FiniteSumCase(InclusionCase):
    """The same as a mean of four terms that differ by multiples of c and by constants."""

    def problem(self, params: Any) -> FiniteSum:
        c, inclusion = params["c"], super().problem(params)
        return FiniteSum(lambda x, i, M: _spread(x, i, M, c), 4, (params["M"],), inclusion.resolvent)

    def explicit(self, params: Any) -> Any:
        x0, inclusion = super().explicit(params)
        return x0, FiniteSum(_spread, 4, inclusion.args, inclusion.resolvent)

    def failures(self, params: Any) -> dict:
        cases = super().failures(params).items()
        return {status: (_repeated(problem), *rest) for status, (problem, *rest) in cases}

    def poisoned(self, params: Any) -> Any:
        inclusion, x0 = super().poisoned(params)
        return _repeated(inclusion), x0

    def sharded_solve(self, solver: Any, params: Any, options: Any) -> Any:
        c = params["c"]
        F = lambda x: {"u": x["u"] + 0.4 * jnp.sin(x["u"]) - c}  # noqa: E731
        problem = Inclusion(F, lambda x, step: jax.tree.map(lambda leaf: jnp.clip(leaf, 0.2, 0.4), x))
        return jaxnum.solve(solver, {"u": jnp.zeros_like(c)}, _repeated(problem), on_failure="return", **options)


def _repeated(problem: Any) -> FiniteSum:
    """A mean of four equal terms; a FiniteSum as it is."""
    if isinstance(problem, FiniteSum):
        return problem
    return FiniteSum(lambda x, i, *args: problem.F(x, *args), 4, problem.args, problem.resolvent)


def _spread(x: Any, i: Any, M: Any, c: Any) -> Any:
    shift = jnp.mean(jnp.asarray([0.5, -0.5, 0.2, -0.2], c.dtype)[i])
    force = _monotone(x, M, c)
    return {"u": force["u"] + shift * c, "v": force["v"] + shift}


def _monotone(x: Any, M: Any, c: Any) -> Any:
    return {"u": x["u"] + jnp.tanh(M @ x["u"]) - c + 0.1 * jnp.sum(x["v"]), "v": 0.5 * x["v"] - 1}


def _shrink(x: Any, by: Any) -> Any:
    return x - jnp.clip(x, -by, by)
