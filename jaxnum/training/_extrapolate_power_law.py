"""A power law through a few sizes, and what it says of larger ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core.precision import accumulator
from kernels_pallas import checks


class PowerLaw(NamedTuple):
    """value = coefficient size^exponent, as `extrapolate_power_law` fits it; call it with a size.

    Attributes:
      coefficient: [] > 0.
      exponent: [].
    """

    coefficient: jax.Array
    exponent: jax.Array

    def __call__(self, size: jax.typing.ArrayLike) -> jax.Array:
        """The value at a size, of any shape."""
        return self.coefficient * jnp.asarray(size, self.exponent.dtype) ** self.exponent

    def reaches(self, value: jax.typing.ArrayLike) -> jax.Array:
        """The size at which a value > 0 is met."""
        return (jnp.asarray(value, self.exponent.dtype) / self.coefficient) ** (1 / self.exponent)


def extrapolate_power_law(sizes: jax.typing.ArrayLike, values: jax.typing.ArrayLike) -> PowerLaw:
    """Fit value = c size^p by least squares in logarithms, to see an instability before it comes.

    At a fixed learning rate the largest attention logit grows as a power of the model's size, and the root mean square
    of gradients falls as one: from a few small models `law(size)` says what a large one will show, and
    `law.reaches(1e4)` at which size attention logits come to where no model was seen to train.

    Args:
      sizes: [m] > 0, m >= 2, not all equal: numbers of parameters, or widths.
      values: [m] > 0.

    Returns:
      A `PowerLaw`: `law(size)` is the value foretold, `law.reaches(value)` its inverse.

    Raises:
      ShapeError: not two vectors of one length; ValueError: fewer than 2 points.

    Cost: none to speak of.

    Numerics: sums of centred logarithms in float32 at least. A value or size that is negative, NaN or inf, or sizes
    that are all equal, give a law of NaN; a value of 0 too.

    Source: M. Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023,
      arXiv 2309.14322, section 3.4.

    Example:
      >>> law = extrapolate_power_law([1e6, 4e6, 16e6], [10.0, 20.0, 40.0])
      >>> print(f"{float(law.exponent):.3f} {float(law(64e6)):.1f} {float(law.reaches(1e4)):.2g}")
      0.500 80.0 1e+12
    """
    name = "extrapolate_power_law"
    given = (_floating(sizes), _floating(values))
    points = checks.shape(name, sizes=(given[0], "m"), values=(given[1], "m"))["m"]
    checks.value(name, "sizes", points >= 2, "have at least 2 entries", points)
    wide = accumulator(jnp.result_type(*given, float))
    x, y = (jnp.log(array.astype(wide)) for array in given)
    # From the first, so that equal sizes leave exactly 0.
    offset = x - x[0]
    offset = offset - offset.mean()
    exponent = jnp.sum(offset * (y - y.mean())) / jnp.sum(offset**2)
    return PowerLaw(jnp.exp(y.mean() - exponent * x.mean()), exponent)


def _floating(numbers: jax.typing.ArrayLike) -> jax.Array:
    """An array, through float64 on the host where that can be: numbers of parameters need not fit int32."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(numbers)):
        return jnp.asarray(numbers)
    return jnp.asarray(np.asarray(numbers) * 1.0)
