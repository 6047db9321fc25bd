"""A loss, its gradient, and what MKOR needs to know of each linear layer, from one backward pass and without hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.transforms import _mkor_layers, _strict
from kernels_pallas import checks
from kernels_pallas.checks import ShapeError

PyTree = Any


class MkorStats(NamedTuple):
    """What `mkor_stats` returns."""

    loss: Any  # what loss_fn returned: a scalar, or (scalar, anything) where has_aux
    grads: PyTree  # like params
    stats: dict[str, tuple[jax.Array, jax.Array]]  # by layer: (a [inputs or inputs + 1], g [outputs])


def mkor_stats(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    layers: _mkor_layers.Layers,
    has_aux: bool = False,
    axis_name: Any = None,
) -> MkorStats:
    """Loss, gradient, and the mean input and mean output gradient of every layer, for `mkor`.

    For a layer s_p = W x_p + b at positions p = 1..P (examples, and places in a sequence) of a mean loss L,

        a = 1/P sum over p of [x_p, 1]   (without the 1 where the layer has no bias),
        g = sum over p of dL/ds_p.

    The loss is a mean: where it is one over the P positions, P dL/ds_p is the gradient of position p's own loss, and g
    the mean of those. (Where it is a mean over sequences, g is the mean over sequences of the sums along them.)

    The model says which layer it is at by `s = tap(name, x, s)`, which changes nothing forward; `loss_fn` receives
    `tap` by keyword. g and P a are cotangents of two vectors of zeros that pass through it, so that a tap may stand
    inside `jax.vmap`, `jax.checkpoint` or a loop, and nothing larger than a layer's width is kept. A layer that is
    tapped several times averages over all of its inputs.

    A plain model:  `h = tap("up", x, x @ p["w"] + p["b"])`. equinox:  `h = tap("layers/0", x, model.layers[0](x))`.
    flax, without touching the model, with `tap` renamed inside `flax.linen.intercept_methods`:

        def spy(call, args, kwargs, context):
            out = call(*args, **kwargs)
            ours = isinstance(context.module, nn.Dense) and context.method_name == "__call__"
            return tap("/".join(context.module.path), args[0], out) if ours else out

    Args:
      loss_fn: (params, *args, tap=tap) -> [] floating, or (that, anything) where `has_aux`. A default
        `tap=lambda name, x, s: s` lets it run by itself.
      params: tree of floating-point arrays. Of an equinox model, its arrays: `equinox.partition(model,
        equinox.is_inexact_array)`, combined again in `loss_fn`.
      *args: passed on, the batch.
      layers: dict of `MkorLayer`, or a function that makes it from params; see `mkor_layers`.
      has_aux: whether `loss_fn` returns something beside the loss.
      axis_name: name or names of the mesh axes of `jax.shard_map`, or of `jax.vmap` or `jax.pmap`, over which the batch
        is split evenly: loss (without aux), gradient and statistics are averaged over them. None averages nothing:
        under `jax.jit` with sharded arrays the means are global already.

    Returns:
      `MkorStats(loss, grads, stats)`, statistics in at least float32; a is NaN for a layer that the loss does not
      reach.

    Raises:
      ValueError: a tap of a name that is no layer, or a layer that is never tapped.
      TypeError, TreeError, ShapeError: layers that do not fit `params`; x or s that do not fit the layer's weight.

    Cost: the gradient of the loss, and a sum of x and of dL/ds for each layer.

    Numerics: sums in at least float32, whatever the model computes in. Non-finite activations make the statistics
    non-finite, which `mkor` counts and leaves out. Divide both the gradient and g by the loss scale if there is one.

    Source: M. Mozaffari, S. Li, Z. Zhang, M. M. Dehnavi, "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
    Rank-1 Updates", 2023, arXiv 2306.01685, section 3; the way without hooks is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnum.transforms import MkorLayer
      >>> def loss(p, x, tap=lambda name, x, s: s):
      ...     return jnp.mean(tap("out", x, x @ p["w"] + p["b"]))
      >>> params = {"w": jnp.ones((2, 1)), "b": jnp.ones(1)}
      >>> layers = {"out": MkorLayer("w", "b")}
      >>> loss, grads, stats = mkor_stats(loss, params, jnp.array([[1.0, 2.0], [3.0, 4.0]]), layers=layers)
      >>> [part.tolist() for part in stats["out"]]
      [[2.0, 3.0, 1.0], [1.0]]
    """
    _strict.parameters("mkor_stats", params, "floating")
    found = _mkor_layers.find("mkor_stats", layers, params)
    wide = {name: accumulator(jax.tree.leaves(params)[layer.weight].dtype) for name, layer in found.items()}
    probes = {
        name: (jnp.zeros(layer.inputs + 1, wide[name]), jnp.zeros(layer.outputs, wide[name]))
        for name, layer in found.items()
    }
    tapped: set[str] = set()

    def loss(params: PyTree, probes: Any) -> Any:
        return loss_fn(params, *args, tap=partial(_tap, found, probes, tapped))

    if axis_name is not None:
        params, probes = jax.tree.map(partial(_local, axis_name), (params, probes))
    out, (grads, sums) = jax.value_and_grad(loss, (0, 1), has_aux=has_aux)(params, probes)
    for name in found:
        wanted = "be tapped by `loss_fn`"
        checks.value("mkor_stats", f"layers[{name!r}]", name in tapped, wanted, "no tap", f"Call tap({name!r}, x, s).")
    stats = {}
    for name, layer in found.items():
        total, g = sums[name]
        stats[name] = (total[: layer.columns] / total[-1], g)
    if axis_name is not None:
        value, grads, stats = jax.lax.pmean((out[0] if has_aux else out, grads, stats), axis_name)
        out = (value, out[1]) if has_aux else value
    return MkorStats(out, grads, stats)


def _tap(
    found: dict[str, _mkor_layers.Found],
    probes: dict[str, Any],
    tapped: set[str],
    name: str,
    x: jax.Array,
    s: jax.Array,
) -> jax.Array:
    """s itself, through which the probes of the layer receive their cotangents."""
    known = ", ".join(repr(n) for n in found)
    checks.value("mkor_stats", "tap", name in found, f"name one of the layers {known}", repr(name))
    layer = found[name]
    fits = x.ndim > 0 and x.shape[-1] == layer.inputs
    remedy = "Set the `order` of its MkorLayer, or tap the input that the weight meets."
    wanted = f"have {layer.inputs} inputs in its last axis"
    checks.value("mkor_stats", f"tap({name!r}, x)", fits, wanted, f"shape {x.shape}", remedy, ShapeError)
    shape = (*x.shape[:-1], layer.outputs)
    checks.value("mkor_stats", f"tap({name!r}, s)", s.shape == shape, f"have shape {shape}", s.shape, "", ShapeError)
    tapped.add(name)
    return _through(s, jax.lax.stop_gradient(x), *probes[name])


@jax.custom_vjp
def _through(s: jax.Array, x: jax.Array, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """s; the cotangent of `inputs` is the sum of [x, 1] over positions, that of `outputs` the sum of s's cotangent."""
    del x, inputs, outputs
    return s


def _forward(s: jax.Array, x: jax.Array, inputs: jax.Array, outputs: jax.Array) -> tuple[jax.Array, Any]:
    return s, (x, inputs, outputs)


def _backward(kept: Any, cotangent: jax.Array) -> tuple[jax.Array, None, jax.Array, jax.Array]:
    x, inputs, outputs = kept
    rows = x.reshape(-1, x.shape[-1]).astype(inputs.dtype)
    rows = jnp.concatenate([rows, jnp.ones((rows.shape[0], 1), rows.dtype)], axis=1)
    return cotangent, None, rows.sum(axis=0), cotangent.reshape(-1, outputs.size).astype(outputs.dtype).sum(axis=0)


_through.defvjp(_forward, _backward)


def _local(axis_name: Any, x: jax.Array) -> jax.Array:
    """A copy that is this device's own: shard_map would sum the gradients of what devices share."""
    return x + 0 * jax.lax.axis_index(axis_name).astype(x.dtype)
