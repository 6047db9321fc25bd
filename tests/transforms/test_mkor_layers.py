"""The layers of plain trees, flax and equinox, and what is no layer."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.transforms import MkorLayer, mkor_layers, scale_by_mkor
from kernels_pallas.checks import ShapeError, TreeError


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(4)(x))
        return nn.Dense(2, use_bias=False, name="head")(x)


def test_plain_trees():
    params = {"blocks": [{"w": jnp.ones((3, 4)), "b": jnp.ones(4)}], "w": jnp.ones((4, 2)), "scale": jnp.ones(3)}
    assert mkor_layers(params, "w", "b") == {"blocks/0": MkorLayer("blocks/0/w", "blocks/0/b"), "": MkorLayer("w")}
    assert list(mkor_layers(params, "w", skip=("",))) == ["blocks/0"]
    assert mkor_layers(params, "w")["blocks/0"].bias is None


def test_flax():
    shapes = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 3)))["params"]
    want = {"Dense_0": MkorLayer("Dense_0/kernel", "Dense_0/bias"), "head": MkorLayer("head/kernel")}
    assert mkor_layers(shapes, "kernel", "bias") == want


def test_equinox():
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    layers = mkor_layers(params, "weight", "bias", order="out_in")
    assert layers["layers/1"] == MkorLayer("layers/1/weight", "layers/1/bias", "out_in")
    state = scale_by_mkor(layers).init(params)
    assert (state.left["layers/1"].shape, state.right["layers/1"].shape) == ((2, 2), (9, 9))


def test_convolutions_are_matrices_of_patches():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 5))  # flax: height, width, inputs, outputs
    stats = {"c": (jnp.arange(18.0), jnp.arange(5.0))}
    tx = scale_by_mkor({"c": MkorLayer("k")})
    step = jax.jit(lambda params: tx.update(params, tx.init(params), params, stats=stats)[0]["k"])
    flat = step({"k": kernel.reshape(18, 5)})
    np.testing.assert_array_equal(step({"k": kernel}).reshape(18, 5), flat)


def test_bad_layers():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    with pytest.raises(
        ValueError, match="mkor_layers: `weight` must name leaves .* got 'kernel' among 'w', 'b'|'b', 'w'"
    ):
        mkor_layers(params, "kernel")
    with pytest.raises(ValueError, match="mkor_layers: `order` must be one of 'in_out', 'out_in'; got 'io'"):
        mkor_layers(params, "w", order="io")
    with pytest.raises(ValueError, match="mkor_layers: `skip` must name layers among ''; got 'head'"):
        mkor_layers(params, "w", skip=("head",))
    for layers, error, words in (
        ([("l", "w")], TypeError, "`layers` must be a dict of MkorLayer; got list. Make it with mkor_layers"),
        ({"l": "w"}, TypeError, r"`layers\['l'\]` must be an MkorLayer; got str"),
        (
            {"l": MkorLayer("x")},
            TreeError,
            r"`layers\['l'\].weight` must be the path of a leaf of `params`, .*; got 'x'",
        ),
        ({"l": MkorLayer("b")}, ShapeError, r"`layers\['l'\].weight` must have two axes or more, .*; got shape \(4,\)"),
        (
            {"l": MkorLayer("w", "b", "out_in")},
            ShapeError,
            r"`layers\['l'\].bias` must have shape \(3,\) to match `w` \(3, 4\), read as out_in; got \(4,\). Set",
        ),
        ({"l": MkorLayer("w"), "m": MkorLayer("w")}, TreeError, r"`layers\['m'\].weight` must be in one layer only"),
        ({"l": MkorLayer("w", order="io")}, ValueError, r"`layers\['l'\].order` must be one of"),
    ):
        with pytest.raises(error, match=f"^scale_by_mkor: {words}"):
            scale_by_mkor(layers).init(params)
