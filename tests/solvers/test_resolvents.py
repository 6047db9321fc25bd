"""Resolvents: each satisfies the variational inequality that defines it, on trees, and keeps the dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.solvers import resolvents
from tests.tolerances import tolerance

RNG = np.random.default_rng(0)
X = {"a": RNG.normal(size=4) * 2, "b": RNG.normal(size=(2, 3)) * 2}
LIKE = {"a": RNG.normal(size=4), "b": RNG.normal(size=(2, 3))}


def dot(a, b):
    return sum(np.vdot(a[k], b[k]) for k in a)


def minus(a, b):
    return {k: np.asarray(a[k]) - np.asarray(b[k]) for k in a}


def scaled(tree, by):
    return {k: by * np.asarray(v) for k, v in tree.items()}


def draw(rng):
    return {"a": rng.normal(size=4), "b": rng.normal(size=(2, 3))}


def on_simplex(tree):
    total = sum(np.sum(np.abs(v)) for v in tree.values())
    return {k: 2.0 * np.abs(v) / total for k, v in tree.items()}


OFFSET = dot(LIKE, X) - 2.0

# set: (its projection, a map of any tree into the set)
SETS = {
    "box": (
        resolvents.box(-0.5, {"a": np.full(4, 0.7), "b": np.full((2, 3), np.inf)}),
        lambda z: {"a": np.clip(z["a"], -0.5, 0.7), "b": np.clip(z["b"], -0.5, np.inf)},
    ),
    "nonnegative": (resolvents.nonnegative(), lambda z: {k: np.abs(v) for k, v in z.items()}),
    "simplex": (resolvents.simplex(2.0), on_simplex),
    "ball": (resolvents.ball(1.5), lambda z: scaled(z, 1.5 / max(1.5, np.sqrt(dot(z, z))))),
    "moved ball": (
        resolvents.ball(1.5, LIKE),
        lambda z: {
            k: LIKE[k] + 1.5 / max(1.5, np.sqrt(dot(minus(z, LIKE), minus(z, LIKE)))) * (z[k] - LIKE[k]) for k in z
        },
    ),
    "l1 ball": (
        resolvents.l1_ball(2.0),
        lambda z: {k: np.sign(z[k]) * v for k, v in on_simplex(z).items()},
    ),
    "half-space": (
        resolvents.halfspace(LIKE, OFFSET),
        lambda z: minus(z, scaled(LIKE, max(0.0, dot(LIKE, z) - OFFSET) / dot(LIKE, LIKE))),
    ),
}


@pytest.mark.parametrize(("project", "into"), SETS.values(), ids=SETS)
def test_projection_is_the_nearest_point(project, into, x64):
    p = project(X, 0.3)
    size = tolerance("float64", 10, condition=10)
    moved = np.sqrt(dot(minus(X, p), minus(X, p)))
    assert moved > 0.1
    again = minus(project(p, 1.0), p)
    assert np.sqrt(dot(again, again)) <= size
    rng = np.random.default_rng(1)
    for _ in range(200):
        member = into(scaled(draw(rng), rng.uniform(0, 4)))
        assert dot(minus(X, p), minus(member, p)) <= size * moved * 10
    # The test has teeth: the set has members near p on the side of x.
    np.testing.assert_allclose(np.sqrt(dot(minus(into(p), p), minus(into(p), p))), 0, atol=size)


def test_soft_thresholding_satisfies_its_inclusion(x64):
    p = resolvents.l1(0.7)(X, 2.0)
    for k, leaf in p.items():
        pull = (X[k] - leaf) / 1.4
        np.testing.assert_allclose(np.where(leaf != 0, pull, np.sign(leaf)), np.sign(leaf), atol=1e-14)
        assert np.all(np.abs(pull) <= 1 + 1e-14)
    assert any(np.any(leaf == 0) for leaf in p.values())
    assert any(np.any(leaf != 0) for leaf in p.values())


def test_psd_part_is_the_nearest_and_its_derivative_is_finite_where_eigenvalues_meet(x64):
    M = RNG.normal(size=(3, 4, 4))
    P = np.asarray(resolvents.psd()(M, 1.0))
    S = (M + np.swapaxes(M, 1, 2)) / 2
    assert np.min(np.linalg.eigvalsh(P)) >= -1e-14
    assert np.min(np.linalg.eigvalsh(P - S)) >= -1e-14  # Moreau: P - S is in the cone, and orthogonal to P
    np.testing.assert_allclose(np.einsum("bij,bij->b", P, P - S), 0, atol=1e-13)
    Q, _ = np.linalg.qr(RNG.normal(size=(4, 4)))
    for values in ([1.0, 1.0, -1.0, -1.0], [2.0, 1.0, -1.0, -3.0]):
        point, direction = Q * values @ Q.T, RNG.normal(size=(4, 4))
        project = lambda x: resolvents.psd()(x, 1.0)  # noqa: E731
        got = jax.jvp(project, (jnp.asarray(point),), (jnp.asarray(direction),))[1]
        numeric = (project(point + 1e-5 * direction) - project(point - 1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(got, numeric, atol=1e-8)


def test_float64_parameters_leave_float32_alone(x64):
    x = {k: jnp.asarray(v, jnp.float32) for k, v in X.items()}
    one = jnp.float64(1.0)
    members = [
        resolvents.box(-one, one),
        resolvents.simplex(one),
        resolvents.ball(one, LIKE),
        resolvents.l1_ball(one),
        resolvents.halfspace(LIKE, one),
        resolvents.l1(one),
        resolvents.product({"a": resolvents.simplex(one), "b": resolvents.ball(one)}),
    ]
    for member in members:
        out = member(x, one)
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("float32")}


def test_product_keeps_the_parts_apart(x64):
    out = resolvents.product({"a": resolvents.simplex(), "b": resolvents.ball()})(X, 1.0)
    np.testing.assert_allclose(np.sum(out["a"]), 1)
    np.testing.assert_allclose(np.linalg.norm(out["b"]), 1)


def test_arguments_outside_their_range():
    with pytest.raises(ValueError, match=r"psd: `x` must have shape \[..., n, n\]"):
        resolvents.psd()(jnp.ones((2, 3)), 1.0)
    with pytest.raises(ValueError, match="box: `lower` must be at most `upper`; got"):
        resolvents.box(1.0, 0.0)
    for make, name in ((resolvents.ball, "radius"), (resolvents.l1_ball, "radius"), (resolvents.simplex, "total")):
        with pytest.raises(ValueError, match=f"{make.__name__}: `{name}` must be a finite real number > 0; got"):
            make(0.0)
