"""Training of deep conjugate directions: fewer iterations on families that were not trained on, and repeatable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum.solvers import dcdm, init_dcdm_network, linear_dcdm_network, ritz_dataset, train_dcdm


def laplacian(u):
    p = jnp.pad(u, 1)
    return 4 * u - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]


@pytest.fixture(scope="module")
def trained():
    like = jnp.zeros((8, 8))
    data = ritz_dataset(laplacian, like, jax.random.key(0), samples=100, vectors=40)
    params = init_dcdm_network(jax.random.key(1), filters=4, levels=3, pairs=1, coarse_pairs=1)
    seen = []
    run = lambda: train_dcdm(  # noqa: E731
        linear_dcdm_network, params, laplacian, data, jax.random.key(2), steps=480, follow=3, progress=seen.append
    )
    return run(), run(), seen


def test_halves_the_iterations_on_other_right_hand_sides_and_a_larger_grid(trained):
    solver = dcdm(linear_dcdm_network, trained[0].params)
    for side in (8, 16):
        for b in (jnp.ones((side, side)), jax.random.normal(jax.random.key(3), (side, side))):
            plain = jaxnum.linear_solve(laplacian, b, rtol=1e-4)
            deep = jaxnum.linear_solve(laplacian, b, rtol=1e-4, solver=solver)
            np.testing.assert_allclose(deep.x, plain.x, atol=1e-2 * float(jnp.max(plain.x)))
            if side == 16:
                assert int(deep.steps) <= 0.5 * int(plain.steps), (int(deep.steps), int(plain.steps))


def test_losses_fall_and_runs_repeat(trained):
    first, again, seen = trained
    losses = np.asarray(first.losses)
    assert losses.shape == (480,)
    assert losses[-20:].mean() < 0.05 * losses[:20].mean()
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.effects_barrier()
    assert seen[0].step == 0
    assert seen[-1].done


def test_bad_input():
    identity = lambda scale, r: scale * r  # noqa: E731
    arguments = (identity, jnp.ones(()), lambda v: v, jnp.ones((4, 3)), jax.random.key(0))
    with pytest.raises(ValueError, match=r"train_dcdm: `steps` must be divisible by rounds \(8\); got 12"):
        train_dcdm(*arguments, steps=12)
    with pytest.raises(ValueError, match="train_dcdm: `learning_rate` must be positive"):
        train_dcdm(*arguments, learning_rate=0.0)
    with pytest.raises(ValueError, match="train_dcdm: `dataset` must have one leading axis"):
        train_dcdm(*arguments[:3], (jnp.ones((4, 3)), jnp.ones((5, 3))), jax.random.key(0))
    with pytest.raises(ValueError, match="train_dcdm: `dataset` must have a sample"):
        train_dcdm(*arguments[:3], jnp.ones((0, 3)), jax.random.key(0))
    poisoned = (identity, jnp.ones(()), lambda v: v, jnp.full((4, 3), jnp.nan), jax.random.key(0))
    with pytest.raises(FloatingPointError, match="train_dcdm: the loss must stay finite; got nan at step 0"):
        train_dcdm(*poisoned, steps=8)
