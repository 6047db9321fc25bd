"""Pruning by optimal brain surgeon: the constrained minimum of the quadratic model, and the paper's sum of singles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import obs_prune
from kernels_pallas.checks import ShapeError

M, D, COUNT, DAMPING = 6, 15, 9, 1e-2


def problem():
    rng = np.random.default_rng(1)
    return rng.normal(size=D), rng.normal(size=(M, D))


def fisher(G):
    return DAMPING * np.eye(G.shape[1]) + G.T @ G / len(G)


def least(w, F):
    inverse = np.linalg.inv(F)
    return np.sort(np.argsort(w**2 / np.diag(inverse))[:COUNT]), inverse


def test_the_joint_correction_is_the_constrained_minimum(x64):
    w, G = problem()
    F = fisher(G)
    S, _ = least(w, F)
    R = np.setdiff1d(np.arange(D), S)
    got = obs_prune(w, G, COUNT, DAMPING)
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(got.kept)), S)
    want = np.zeros(D)
    want[R] = w[R] + np.linalg.solve(F[np.ix_(R, R)], F[np.ix_(R, S)] @ w[S])
    np.testing.assert_allclose(got.weights, want, rtol=1e-11, atol=1e-12)


def test_the_single_correction_adds_what_each_removal_asks_for(x64):
    w, G = problem()
    S, inverse = least(w, fisher(G))
    want = w - sum(w[p] / inverse[p, p] * inverse[:, p] for p in S)
    want[S] = 0
    np.testing.assert_allclose(obs_prune(w, G, COUNT, DAMPING, correction="single").weights, want, atol=1e-11)
    # One weight alone: both are the classical correction.
    both = [obs_prune(w, G, 1, DAMPING, correction=name).weights for name in ("joint", "single")]
    np.testing.assert_allclose(*both, rtol=1e-11, atol=1e-12)


def test_blocks_prune_by_their_own_inverse(x64):
    w, G = problem()
    F = np.zeros((D, D))
    for start in range(0, D, 4):
        part = slice(start, start + 4)
        F[part, part] = fisher(G[:, part])
    S, _ = least(w, F)
    R = np.setdiff1d(np.arange(D), S)
    want = np.zeros(D)
    want[R] = w[R] + np.linalg.solve(F[np.ix_(R, R)], F[np.ix_(R, S)] @ w[S])
    np.testing.assert_allclose(obs_prune(w, G, COUNT, DAMPING, block=4).weights, want, rtol=1e-11, atol=1e-12)


def test_stages_keep_what_went_before_and_all_may_go():
    w, G = (x.astype("float32") for x in problem())
    first = obs_prune(w, G, 5, DAMPING)
    second = obs_prune(first.weights, G, jnp.int32(8), DAMPING)
    assert (int(second.kept.sum()), bool((first.kept | ~second.kept).all())) == (D - 8, True)
    assert (second.weights == 0).tolist() == (~second.kept).tolist()
    assert obs_prune(w, G, D, DAMPING).weights.tolist() == [0.0] * D
    np.testing.assert_array_equal(obs_prune(w, G, 0, DAMPING, correction="none").weights, w)


def test_bad_input():
    w, G = (x.astype("float32") for x in problem())
    with pytest.raises(ValueError, match="obs_prune: `count` must be in 0 to 15; got 16"):
        obs_prune(w, G, 16)
    # A constant that is an array can be read inside jax.jit too.
    two = jnp.int32(2)
    assert int(jax.jit(lambda w: obs_prune(w, G, two).kept.sum())(w)) == 13
    with pytest.raises(ValueError, match="obs_prune: `correction` must be one of 'joint', 'single', 'none'"):
        obs_prune(w, G, 1, correction="all")
    for damping in (0, np.int64(0)):
        with pytest.raises(ValueError, match="obs_prune: `damping` must be greater than 0; got 0"):
            obs_prune(w, G, 1, damping)
    with pytest.raises(ValueError, match="obs_prune: `block` must be a Python int of at least 1"):
        obs_prune(w, G, 1, block=0)
    with pytest.raises(ShapeError, match="obs_prune: `gradients` must have shape"):
        obs_prune(w, G[:, 1:], 1)


def test_cancellation_prunes_no_weight_of_large_curvature():
    # The first two cost 1e6 times what the others do, and their computed diagonal may be negative.
    G = np.random.default_rng(0).normal(size=(2000, 4, 6)).astype("float32") * np.float32([1e3, 1e3, 1, 1, 1, 1])
    kept = jax.jit(jax.vmap(lambda G: obs_prune(jnp.ones(6), G, 1, 1e-3).kept))(G)
    assert bool(kept[:, :2].all())


def test_weights_whose_squares_vanish_do_not_tie_with_zero():
    kept = obs_prune(jnp.array([1e-25, 1.0, 0.0]), jnp.ones((2, 3)), 1).kept
    assert kept.tolist() == [True, True, False]
