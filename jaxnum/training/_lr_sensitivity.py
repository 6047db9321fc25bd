"""Learning-rate sensitivity: how much of the loss a wrong learning rate costs, and the sweep that measures it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core.precision import accumulator
from kernels_pallas import checks

# Ends of the range count as inside when they are a rounding of float32, or several, beyond.
_SLACK = 1e-4


class LrSweep(NamedTuple):
    """What `lr_sensitivity_sweep` returns, for M learning rates and S keys.

    Attributes:
      learning_rates: [M], ascending as given.
      initial_losses: [M, S].
      final_losses: [M, S], not finite where a run diverged.
      sensitivity: [S], of the runs of each key.
      best: [S], the learning rate of the least final loss of each key, from the whole sweep; NaN if none is finite.
    """

    learning_rates: jax.Array
    initial_losses: jax.Array
    final_losses: jax.Array
    sensitivity: jax.Array
    best: jax.Array


def lr_sensitivity(
    learning_rates: jax.typing.ArrayLike,
    final_losses: jax.typing.ArrayLike,
    initial_loss: jax.typing.ArrayLike,
    *,
    low: float = 3e-4,
    high: float = 3e-1,
) -> jax.Array:
    """How much worse than the best a run is on average, over learning rates of several orders of magnitude.

    For the learning rates η of a logarithmic grid in [low, high], with losses l(η) at the end and l_0 at the start:

        mean over η of min(l(η), l_0), minus the least min(l(η), l_0).

    Without the minimum one divergence would decide. 0 is flat; l_0 - l* is its supremum. Compare it between models and
    methods on one grid: another range gives another number.

    Args:
      learning_rates: [M], positive, evenly spaced in their logarithm, for the mean to mean what it should.
      final_losses: [M, ...]; one that is not finite counts as l_0.
      initial_loss: [...] or scalar, finite.
      low: of the range, inclusive.
      high: of the range, inclusive, > low.

    Returns:
      [...], at least float32. NaN where no final loss in the range is finite or no learning rate lies in it: nothing
      was trained, and flat would be a lie.

    Raises:
      ShapeError: the first axis of `final_losses` is not M, or `initial_loss` does not fit the others.
      ValueError: the range is empty, or a learning rate is not positive, unless traced.

    Cost: none to speak of.

    Numerics: ends of the range are inclusive up to 1e-4 of them. NaN in `initial_loss` gives NaN.

    Source: M. Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023,
      arXiv 2309.14322, section 2.2.

    Example:
      >>> rates = [1e-3, 1e-2, 1e-1]
      >>> print(f"{float(lr_sensitivity(rates, [1.0, 1.0, float('nan')], 4.0)):.4f}")  # one of three, 4 - 1 worse
      1.0000
    """
    rates, final, initial = (jnp.asarray(x) for x in (learning_rates, final_losses, initial_loss))
    checks.shape("lr_sensitivity", learning_rates=(rates, "M"), final_losses=(final, "M *B"))
    if initial.ndim > 0:
        checks.shape("lr_sensitivity", final_losses=(final, "_ *B"), initial_loss=(initial, "*B"))
    _check_range("lr_sensitivity", low, high)
    if not checks.traced(rates):
        checks.value("lr_sensitivity", "learning_rates", bool((np.asarray(rates) > 0).all()), "be positive", rates)
    wide = accumulator(jnp.result_type(final, initial))
    inside = (rates >= low * (1 - _SLACK)) & (rates <= high * (1 + _SLACK))
    inside = inside.reshape((-1,) + (1,) * (final.ndim - 1))
    finite = jnp.isfinite(final)
    losses = jnp.where(finite, jnp.minimum(final, initial), initial).astype(wide)
    excess = losses - jnp.min(losses, axis=0, where=inside, initial=jnp.inf)
    mean = jnp.mean(excess, axis=0, where=inside)
    return jnp.where(jnp.any(finite & inside, axis=0), mean, jnp.nan)


def lr_sensitivity_sweep(
    train: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    keys: jax.Array,
    *,
    learning_rates: jax.typing.ArrayLike | None = None,
    low: float = 3e-4,
    high: float = 3e-1,
    points: int = 7,
    batch_size: int | None = None,
) -> LrSweep:
    """Train at every learning rate of a logarithmic grid and measure how sensitive the loss is to the choice.

    All runs are one compiled program: for each key, and `batch_size` at a time, runs go side by side under `jax.vmap`.

    Args:
      train: `(learning_rate, key) -> (initial_loss, final_loss)`, scalars, that can be traced and batched: a
        `jax.lax.scan` over steps with an optax optimiser of a traced learning rate. A final loss over the last steps or
        on held-out data has less noise than the last batch's.
      keys: [S] typed keys, for initial parameters and batches; more than one show how much is chance.
      learning_rates: [M] ascending; None is the grid of `points` from `low` to `high`.
      low: of the range of `lr_sensitivity`, inclusive.
      high: likewise, > low.
      points: of the grid, at least 2.
      batch_size: runs side by side, >= 1, of the M S; None is all. Each holds its own parameters and state.

    Returns:
      An `LrSweep`.

    Raises:
      ShapeError: keys are not [S], rates not [M], losses not scalars; DtypeError: keys are not typed.
      ValueError: an option out of range, or rates that are not positive and ascending, unless traced.

    Cost: M S runs.

    Numerics: as `lr_sensitivity`: diverged runs stay to be seen in `final_losses` and count as the initial loss.

    Source: as `lr_sensitivity`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def train(rate, key):  # gradient descent on 5 x^2 from 1, which diverges for rates above 0.2
      ...     x = jax.lax.fori_loop(0, 50, lambda i, x: x - 10 * rate * x, 1.0)
      ...     return 5.0, 5 * x**2
      >>> sweep = lr_sensitivity_sweep(train, jax.random.split(jax.random.key(0), 1))
      >>> print([f"{x:.1g}" for x in sweep.final_losses[:, 0].tolist()], f"{float(sweep.sensitivity[0]):.2f}")
      ['4', '2', '0.2', '0.0002', '2e-15', '0', '6e+30'] 1.55
    """
    name = "lr_sensitivity_sweep"
    _check_range(name, low, high)
    checks.value(name, "points", isinstance(points, int) and points >= 2, "be an int of at least 2", points)
    remedy = "Pass jax.random.split(jax.random.key(seed), S)."
    got = getattr(keys, "dtype", type(keys))
    typed = jnp.issubdtype(got, jax.dtypes.prng_key)
    checks.value(name, "keys", typed, "be typed random keys", got, remedy, checks.DtypeError)
    checks.shape(name, remedy=remedy, keys=(keys, "S"))
    rates = jnp.asarray(np.geomspace(low, high, points) if learning_rates is None else learning_rates, float)
    checks.shape(name, learning_rates=(rates, "M"))
    if not checks.traced(rates):
        # From 0 on, so that the first is positive. Not by jnp, which inside jax.jit traces constants too.
        ascending = bool((np.diff(np.asarray(rates), prepend=0) > 0).all())
        checks.value(name, "learning_rates", ascending, "be positive and ascending", rates)
    if batch_size is not None:
        ok = isinstance(batch_size, int) and batch_size >= 1
        checks.value(name, "batch_size", ok, "be an int of at least 1", batch_size)

    def one(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        initial, final = train(*pair)
        checks.shape(name, remedy="`train` returns two scalars.", initial_loss=(initial, ""), final_loss=(final, ""))
        return jnp.asarray(initial, float), jnp.asarray(final, float)

    def every(rates: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        grid = (jnp.repeat(rates, keys.size), jnp.tile(keys, rates.size))
        flat = (
            jax.vmap(lambda rate, key: one((rate, key)))(*grid)
            if batch_size is None
            else jax.lax.map(one, grid, batch_size=batch_size)
        )
        return flat[0].reshape(rates.size, keys.size), flat[1].reshape(rates.size, keys.size)

    initial, final = jax.jit(every)(rates, keys)
    losses = jnp.where(jnp.isfinite(final), final, jnp.inf)
    best = jnp.where(jnp.isfinite(final).any(axis=0), rates[jnp.argmin(losses, axis=0)], jnp.nan)
    # A model's loss before training knows no learning rate.
    sensitivity = lr_sensitivity(rates, final, initial[0], low=low, high=high)
    return LrSweep(rates, initial, final, sensitivity, best)


def _check_range(function: str, low: Any, high: Any) -> None:
    checks.value(function, "low", low > 0, "be greater than 0", low)
    checks.value(function, "high", high > low, f"be greater than low = {low}", high)
