"""MKOR: its factors against dense inverses, what stands around them by hand, and one device against eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnum.transforms import MkorLayer, mkor, mkor_layers, mkor_stats, scale_by_mkor
from kernels_pallas.checks import DtypeError, ShapeError, TreeError
from tests.tolerances import tolerance

LAYERS = {"l": MkorLayer("w", "b")}
PLAIN = {"l": MkorLayer("w")}
UNLIMITED = dict(norm_limit=np.inf, clip_value=np.inf)


def after(statistics, weight, **options):
    """State of a layer without bias after an update by each of the statistics (a [T, inputs], g [T, outputs])."""
    tx = scale_by_mkor(PLAIN, stats_every=1, **options)

    @jax.jit
    def train(statistics):
        def step(state, pair):
            return tx.update({"w": weight}, state, {"w": weight}, stats={"l": pair})[1], None

        return jax.lax.scan(step, tx.init({"w": weight}), statistics)[0]

    return train(statistics)


def once(tx, grads, params, stats, state=None):
    """One compiled update, from the first state if none is given."""
    return jax.jit(lambda *args: tx.update(*args, params, stats=stats))(grads, state or tx.init(params))


def draws(key, steps, inputs, outputs, dtype=float):
    keys = jax.random.split(key)
    return tuple(jax.random.normal(k, (steps, size), dtype) for k, size in zip(keys, (inputs, outputs), strict=True))


def test_exact_factors_are_the_inverses_of_the_running_moments(key, x64):
    steps, gamma = 50, 0.95
    statistics = draws(key, steps, 12, 16)
    state = after(statistics, jnp.ones((12, 16)), gamma=gamma, **UNLIMITED)
    for got, vectors in zip((state.right["l"], state.left["l"]), statistics, strict=True):
        v, decay = np.asarray(vectors), gamma ** np.arange(steps - 1, -1, -1.0)
        want = np.linalg.inv(gamma**steps * np.eye(v.shape[1]) + (1 - gamma) * np.einsum("t,ti,tj->ij", decay, v, v))
        assert np.linalg.norm(got - want) < 1e-9 * np.linalg.norm(want)


def test_reference_factors_are_inverses_of_the_damped_sum(key, x64):
    _, g = draws(key, 3, 2, 4)
    state = after((jnp.ones((3, 2)), g), jnp.ones((2, 4)), variant="reference", gamma=0.95)
    want = np.eye(4)
    for vector in np.asarray(g):
        damped = np.linalg.inv(0.95 * want + 0.05 * np.eye(4))
        want = np.linalg.inv(damped + np.outer(vector, vector))
    np.testing.assert_allclose(state.left["l"], want, rtol=tolerance("float64", 16, condition=100))


@pytest.mark.parametrize("variant", ["exact", "reference"])
def test_factors_stay_positive_definite_for_a_thousand_updates(key, variant, float_dtype):
    state = after(draws(key, 1000, 8, 16, float_dtype), jnp.ones((8, 16), float_dtype), variant=variant)
    for factor in (state.left["l"], state.right["l"]):
        assert factor.dtype == float_dtype
        np.testing.assert_array_equal(factor, factor.T)
        values = np.linalg.eigvalsh(np.asarray(factor, float))
        assert values[0] > 0
        assert variant == "exact" or values[-1] <= 1 + 1e-6


def test_unvisited_directions_grow_until_the_limit(x64):
    statistics = jnp.ones((200, 1)), jnp.tile(jnp.eye(4)[0], (200, 1))
    free = after(statistics, jnp.ones((1, 4)), **UNLIMITED).left["l"]
    np.testing.assert_allclose(free[1, 1], 0.95**-200.0, rtol=tolerance("float64", 200))
    held = after(statistics, jnp.ones((1, 4)), norm_limit=100.0).left["l"]
    assert 50 < held[1, 1] <= 100 / 0.95


def test_limit_and_clip_by_hand(x64):
    g = jnp.array([[3.0, -500.0]])
    state = after((jnp.ones((1, 1)), g), jnp.ones((1, 2)), norm_limit=0.5, zeta=0.5, clip_value=4.0, gamma=0.9)
    clipped = np.array([3.0, -4.0])  # the identity is above the limit, and drawn to itself
    want = np.linalg.inv(0.9 * np.eye(2) + 0.1 * np.outer(clipped, clipped))
    np.testing.assert_allclose(state.left["l"], want, rtol=tolerance("float64", 4))


def layer_problem(key, dtype=float):
    keys = jax.random.split(key, 4)
    params = {"w": jnp.zeros((3, 5), dtype), "b": jnp.zeros(5, dtype), "other": jnp.ones(2, dtype)}
    grads = {
        "w": jax.random.normal(keys[0], (3, 5), dtype),
        "b": jax.random.normal(keys[1], (5,), dtype),
        "other": jnp.full(2, 7.0, dtype),
    }
    a = jnp.append(jax.random.normal(keys[2], (3,), dtype), jnp.ones(1, dtype))
    return params, grads, {"l": (a, jax.random.normal(keys[3], (5,), dtype))}


def test_direction_against_dense_algebra(key, x64):
    params, grads, stats = layer_problem(key)
    tx = scale_by_mkor(LAYERS, gamma=0.8, **UNLIMITED)
    got, state = once(tx, grads, params, stats)
    a, g = (np.asarray(part) for part in stats["l"])
    left, right = (np.linalg.inv(0.8 * np.eye(v.size) + 0.2 * np.outer(v, v)) for v in (g, a))
    gradient = np.column_stack([grads["w"].T, grads["b"]])
    want = left @ gradient @ right
    want *= np.linalg.norm(gradient) / np.linalg.norm(want)
    np.testing.assert_allclose(got["w"].T, want[:, :3], rtol=tolerance("float64", 20, condition=10))
    np.testing.assert_allclose(got["b"], want[:, 3], rtol=tolerance("float64", 20, condition=10))
    np.testing.assert_array_equal(got["other"], grads["other"])
    # The same layer the other way round.
    turned = {**params, "w": params["w"].T}
    tx = scale_by_mkor({"l": MkorLayer("w", "b", "out_in")}, gamma=0.8, **UNLIMITED)
    other, _ = once(tx, {**grads, "w": grads["w"].T}, turned, stats)
    np.testing.assert_allclose(other["w"].T, got["w"], rtol=tolerance("float64", 20))
    assert int(state.count) == 1


def test_each_layer_keeps_its_norm(key):
    keys = iter(jax.random.split(key, 8))
    params = {n: {"w": scale * jax.random.normal(next(keys), (4, 6))} for n, scale in (("a", 1e-3), ("b", 1e3))}
    layers = mkor_layers(params, "w")
    stats = {n: (jax.random.normal(next(keys), (4,)), jax.random.normal(next(keys), (6,))) for n in layers}
    for variant in ("exact", "reference"):
        tx = scale_by_mkor(layers, variant=variant)
        got, _ = once(tx, params, params, stats)
        for n in layers:
            np.testing.assert_allclose(np.linalg.norm(got[n]["w"]), np.linalg.norm(params[n]["w"]), rtol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, params)
    got, _ = once(tx, zero, params, stats)
    np.testing.assert_array_equal(got["a"]["w"], 0)


def test_factors_change_only_at_their_steps(key):
    params, grads, stats = layer_problem(key, jnp.float32)
    tx = scale_by_mkor(LAYERS, stats_every=3, warmup_steps=2)
    state, changed = tx.init(params), []
    update = jax.jit(lambda state: tx.update(grads, state, params, stats=stats)[1])
    for _ in range(7):
        before, state = state, update(state)
        changed.append(bool((before.left["l"] != state.left["l"]).any()))
    assert changed == [True, True, False, True, False, False, True]


def test_non_finite_statistics_are_left_out_and_counted(key):
    params, grads, stats = layer_problem(key, jnp.float32)
    tx = scale_by_mkor(LAYERS, stats_every=1)
    update = jax.jit(lambda grads, state, stats: tx.update(grads, state, params, stats=stats))
    _, state = update(grads, tx.init(params), stats)
    a, g = stats["l"]
    for pair in ((a.at[0].set(jnp.nan), g), (a, g.at[0].set(jnp.inf)), (a.at[3].set(-jnp.inf), g)):
        got, after_bad = update(grads, state, {"l": pair})
        assert int(after_bad.skipped["l"]) == 1
        np.testing.assert_array_equal(after_bad.left["l"], state.left["l"])
        np.testing.assert_array_equal(after_bad.right["l"], state.right["l"])
        assert bool(jnp.isfinite(got["w"]).all())
    # A gradient that is not finite shows in its layer and reaches no factor.
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        got, after_bad = update({**grads, "w": grads["w"].at[0, 0].set(bad)}, state, stats)
        assert not bool(jnp.isfinite(got["w"]).any() | jnp.isfinite(got["b"]).any())
        np.testing.assert_array_equal(got["other"], grads["other"])
        assert bool(jnp.isfinite(after_bad.left["l"]).all())


def test_bfloat16_factors_lose_no_more_than_their_rounding(key):
    params, grads, stats = layer_problem(key, jnp.float32)
    got = {}
    for dtype in ("bfloat16", "float32"):
        tx = scale_by_mkor(LAYERS, factor_dtype=dtype)
        got[dtype], state = once(tx, grads, params, stats)
        assert state.left["l"].dtype == state.right["l"].dtype == dtype
    off = np.linalg.norm(got["bfloat16"]["w"] - got["float32"]["w"]) / np.linalg.norm(got["float32"]["w"])
    assert 0 < off < tolerance("bfloat16", condition=2)


def test_optimiser_is_momentum_decay_and_rate(key, x64):
    params, grads, stats = layer_problem(key)
    params = jax.tree.map(lambda p: p + 1, params)
    ours = mkor(0.1, LAYERS, momentum=0.8, weight_decay=0.01)
    peer = optax.chain(
        scale_by_mkor(LAYERS), optax.trace(0.8), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(0.1)
    )
    adam = mkor(0.1, LAYERS, inner=optax.scale_by_adam())
    by_adam = optax.chain(scale_by_mkor(LAYERS), optax.adam(0.1))
    for one, other in ((ours, peer), (adam, by_adam)):
        got, want = (once(tx, grads, params, stats, once(tx, grads, params, stats)[1])[0] for tx in (one, other))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance("float64", 30)), got, want)


def test_other_leaves_under_another_optimiser(key):
    params, grads, stats = layer_problem(key, jnp.float32)
    parts = {"mkor": mkor(0.1, LAYERS), "sgd": optax.sgd(0.5)}
    tx = optax.multi_transform(parts, {"w": "mkor", "b": "mkor", "other": "sgd"})
    got, _ = once(tx, grads, params, stats)
    want, _ = once(mkor(0.1, LAYERS), grads, params, stats)
    np.testing.assert_allclose(got["w"], want["w"], rtol=tolerance("float32", 20))
    np.testing.assert_allclose(got["other"], -0.5 * grads["other"], rtol=tolerance("float32"))


def network(key):
    keys = jax.random.split(key, 4)
    params = {
        "up": {"w": jax.random.normal(keys[0], (6, 8)), "b": jnp.zeros(8)},
        "down": {"w": jax.random.normal(keys[1], (8, 8)) / 3, "b": jnp.zeros(8)},
    }
    return params, (jax.random.normal(keys[2], (64, 6)), jax.random.normal(keys[3], (64, 8)))


def network_loss(p, x, y, tap=lambda name, x, s: s):
    h = jnp.tanh(tap("up", x, x @ p["up"]["w"] + p["up"]["b"]))
    return jnp.mean((tap("down", h, h @ p["down"]["w"] + p["down"]["b"]) - y) ** 2)


def test_eight_devices_equal_one():
    params, batch = network(jax.random.key(0))
    layers = mkor_layers(params, "w", "b")
    tx = mkor(0.1, layers, stats_every=2)

    def step(params, state, batch, axis_name=None):
        loss, grads, stats = mkor_stats(network_loss, params, *batch, layers=layers, axis_name=axis_name)
        updates, state = tx.update(grads, state, params, stats=stats)
        return optax.apply_updates(params, updates), state, loss

    def train(step, params, batch):
        state = tx.init(params)
        for _ in range(3):
            params, state, loss = step(params, state, batch)
        return params, state, loss

    compiled = jax.jit(step)
    want = train(compiled, params, batch)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    whole, split, last = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("d",), (None, "d")))
    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec("d"))
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(partial(step, axis_name="d"))
    for run, weights, biases in ((compiled, whole, whole), (compiled, last, split), (jax.jit(mapped), whole, whole)):
        placed = jax.tree.map(lambda p, w=weights, b=biases: jax.device_put(p, w if p.ndim == 2 else b), params)
        got = train(run, placed, jax.device_put(batch, split))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), got, want)
        for tree in (got[0], got[1][1].trace):
            kept = jax.tree.map(lambda a, p: a.sharding.is_equivalent_to(p.sharding, a.ndim), tree, placed)
            assert all(jax.tree.leaves(kept))


def test_bad_arguments(key):
    params, grads, stats = layer_problem(key, jnp.float32)
    for options, words in (
        (dict(gamma=1.0), r"`gamma` must be in \(0, 1\); got 1.0"),
        (dict(zeta=2.0), r"`zeta` must be in \[0, 1\]; got 2.0"),
        (dict(stats_every=0), "`stats_every` must be at least 1; got 0"),
        (dict(warmup_steps=-1), "`warmup_steps` must be at least 0; got -1"),
        (dict(norm_limit=0.0), "`norm_limit` must be greater than 0; got 0.0"),
        (dict(variant="printed"), "`variant` must be one of 'exact', 'reference'; got 'printed'"),
    ):
        with pytest.raises(ValueError, match=f"^mkor: {words}"):
            mkor(0.1, LAYERS, **options)
    with pytest.raises(TypeError, match="mkor: `inner` must be an optax gradient transformation; got function"):
        mkor(0.1, LAYERS, inner=optax.adam)
    with pytest.raises(ValueError, match=r"mkor: `momentum` must be in \[0, 1\); got 1.5"):
        mkor(0.1, LAYERS, momentum=1.5)
    tx = mkor(0.1, LAYERS)
    state, (a, g) = tx.init(params), stats["l"]
    for bad, error, words in (
        (None, ValueError, "`stats` must be given, a dict of pairs by layer; got NoneType. Pass update"),
        ({"m": (a, g)}, TreeError, r"`stats` must have the layers \['l'\]; got \['m'\]"),
        ({"l": a}, TypeError, r"`stats\['l'\]` must be a pair \(a, g\); got"),
        ({"l": (a[:3], g)}, ShapeError, r"`stats\['l'\]\[0\]` must have shape \(4,\), one entry .*bias; got \(3,\)"),
        ({"l": (g, a)}, ShapeError, r"`stats\['l'\]\[0\]` must have shape \(4,\)"),
        ({"l": (a, g[None])}, ShapeError, r"`stats\['l'\]\[1\]` must have shape \(5,\), .*outputs; got \(1, 5\)"),
        ({"l": (a, jnp.arange(5))}, DtypeError, r"`stats\['l'\]\[1\]` must have a floating-point dtype; got int32"),
    ):
        with pytest.raises(error, match=f"^mkor: {words}"):
            tx.update(grads, state, params, stats=bad)


def test_spoilt_bfloat16_factors_start_again():
    # Inputs of a large mean: eigenvalues beyond bfloat16's range, which went to -inf.
    rng = np.random.default_rng(0)
    a = (np.abs(rng.normal(size=512)) + 0.1 * rng.normal(size=(120, 512))).astype("float32")
    state = after((a, jnp.ones((120, 1))), jnp.ones((512, 1)), factor_dtype="bfloat16")
    assert float(jnp.abs(state.right["l"]).max()) < 200


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_norms_of_small_and_large_gradients(key, scale):
    params, grads, stats = layer_problem(key, jnp.float32)
    tx = scale_by_mkor(LAYERS)
    (want, _), (got, _) = (once(tx, optax.tree.scale(s, grads), params, stats) for s in (1.0, scale))
    np.testing.assert_allclose(got["w"] / scale, want["w"], rtol=tolerance("float32", 20))


def test_an_empty_dict_of_layers_is_refused():
    with pytest.raises(
        ValueError, match="^mkor: `layers` must have a layer; got an empty dict. Make it with mkor_layers"
    ):
        mkor(0.1, {})
