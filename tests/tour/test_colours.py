import jax.numpy as jnp
import numpy as np

import jaxnum
from jaxnum.tour import _colours as stop


def test_carry_agrees_with_the_plan_on_the_sampled_colours(x64):
    random = np.random.default_rng(0)
    x, y = random.random((2, 12, 3))
    a = jnp.full(12, 1 / 12)
    cost = jaxnum.PointCloudCost(jnp.asarray(x), jnp.asarray(y))
    solution = jaxnum.transport(cost, a, a, 0.05, rtol=1e-12)
    plan = jaxnum.Transport(cost, a, a, 0.05).plan(solution.x)
    carried = stop.carry(x.reshape(3, 4, 3), jnp.asarray(y), solution.x[1], 0.05)
    np.testing.assert_allclose(carried.reshape(-1, 3), 12 * plan @ y, rtol=1e-9)


def test_stop_brings_the_mean_colours_together():
    found = stop.colours(samples=80, stride=16, epsilon=0.02)
    rows = dict(found.rows)
    assert float(rows["distance of the mean colours, after"]) < 0.3 * float(
        rows["distance of the mean colours, before"]
    )
    errors = rows["marginal error in the L1 norm, over-relaxed / plain"].split(" / ")
    assert max(map(float, errors)) <= 1e-4
    sweeps, newton = rows["steps to 1e-09 in float64, sweeps alone / sweeps + Newton"].split(" / ")
    assert sum(map(int, newton.split(" + "))) < int(sweeps)
    assert float(rows["marginal error of these, sweeps alone / sweeps + Newton"].split(" / ")[1]) <= 1e-9
