"""Hutchinson's diagonal of an operator on a tree, within its own error of the dense one."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.curvature import gauss_newton_product, hutchinson_diagonal
from tests.curvature.problems import dense, losses, network


def test_of_a_gauss_newton_matrix_on_its_tree(key, x64):
    params, logits = network()
    product = gauss_newton_product(logits, lambda z: jnp.mean(losses(z)), params)
    mean, error = hutchinson_diagonal(product, params, key, num_probes=2000)
    want = np.diag(dense(product, params))
    got, spread = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (mean, error))
    assert bool((jnp.abs(got - want) < 5 * spread + 1e-12).all())
    assert jax.tree.map(jnp.shape, mean) == jax.tree.map(jnp.shape, params)
