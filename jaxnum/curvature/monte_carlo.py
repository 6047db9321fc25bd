"""The door to matfree's Monte Carlo estimators, which are imported when first used."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from jaxnum.core import trees
from jaxnum.core.functions import Function
from jaxnum.curvature import arguments, operators
from kernels_pallas import checks

PyTree = Any


def mean_and_error(function: str, integrand: str, op: Any, like: PyTree, key: jax.Array, num_probes: int) -> tuple:
    """The mean over sign probes of one of matfree's integrands, and its standard error.

    Args:
      function: name of the public function, first word of errors.
      integrand: what `matfree.stochtrace` calls it.
      op: linear function on trees like `like`, or an array.
      like: pytree of floating-point arrays.
      key: [] typed random key.
      num_probes: at least 2.

    Raises:
      ImportError: matfree is missing.
    """
    arguments.typed_key(function, key)
    ok = isinstance(num_probes, int) and not isinstance(num_probes, bool) and num_probes >= 2
    checks.value(function, "num_probes", ok, "be a Python int >= 2", num_probes, "One probe has no standard error.")
    like = trees.strong(like)
    operator = operators.operator(function, op, like)
    try:
        import matfree.stochtrace as stochtrace
    except ImportError as error:
        raise ImportError(f'{function}: matfree is missing: pip install "jaxnum[interop]"') from error
    return _estimate(stochtrace, integrand, num_probes, operator, like, key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _estimate(stochtrace: Any, integrand: str, num_probes: int, op: Function, like: PyTree, key: jax.Array) -> tuple:
    # Probes and sums in accumulators: matfree works in the dtype of what it samples.
    sampler = stochtrace.sampler_signs(operators.wide(like), num=num_probes)
    estimator = stochtrace.estimator_monte_carlo_mean_and_sem(getattr(stochtrace, integrand)(), sampler)
    mean, error = estimator(lambda v: operators.apply(op, v, like), key)
    # Its standard deviation divides by the number of probes, which is too small a deviation for few of them.
    unbiased = (num_probes / (num_probes - 1)) ** 0.5
    return mean, jax.tree.map(lambda e: e * unbiased, error)
