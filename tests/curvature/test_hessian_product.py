"""Hessian products: the dense Hessian in every mode, and kernels that refuse forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.curvature import hessian_product
from kernels_pallas import attention
from kernels_pallas.checks import DtypeError, ShapeError, TreeError
from tests.curvature.problems import dense, flat, losses, network
from tests.tolerances import tolerance


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_equals_the_dense_hessian(mode, x64):
    params, logits = network()
    loss = lambda p: jnp.mean(losses(logits(p)))  # noqa: E731
    vector, f, _ = flat(loss, params)
    want = jax.hessian(f)(vector)
    np.testing.assert_allclose(dense(hessian_product(loss, params, mode=mode), params), want, atol=1e-12)


@pytest.mark.parametrize("jitted", [False, True])
def test_auto_goes_through_kernels_that_refuse_forward_mode(jitted):
    q, k, v = jax.random.normal(jax.random.key(3), (3, 1, 5, 1, 4))

    def loss(w, of=None):
        return jnp.sum(attention(q * w, k, v, causal=True, implementation=of) ** 2)

    f = jax.jit(loss) if jitted else loss
    w = jnp.float32(1.3)
    want = jax.hessian(lambda w: loss(w, "reference"))(w)
    np.testing.assert_allclose(hessian_product(f, w)(jnp.float32(1.0)), want, rtol=tolerance("float32", 100))
    with pytest.raises(TypeError, match="forward-mode|custom_vjp"):
        hessian_product(loss, w, mode="forward")(jnp.float32(1.0))


def test_bad_input():
    f = lambda x: jnp.sum(x**2)  # noqa: E731
    with pytest.raises(ValueError, match="hessian_product: `mode` must be one of 'auto', 'forward', 'reverse'"):
        hessian_product(f, jnp.ones(3), mode="backward")
    with pytest.raises(DtypeError, match="hessian_product: `params` must have a floating-point dtype; got int32"):
        hessian_product(f, jnp.arange(3))
    with pytest.raises(ShapeError, match=r"hessian_product: `v` must have shape \(3,\) to match `params`"):
        hessian_product(f, jnp.ones(3))(jnp.ones(2))
    with pytest.raises(TreeError, match="hessian_product: `v` must have the tree structure of `params`"):
        hessian_product(f, jnp.ones(3))({"a": jnp.ones(3)})
    with pytest.raises(ShapeError, match=r"hessian_product: `f\(params\)` must be one real scalar; got \(3,\)"):
        hessian_product(lambda x: x, jnp.ones(3))(jnp.ones(3))
