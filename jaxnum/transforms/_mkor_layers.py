"""Which leaves of a tree of parameters are the weight and the bias of a linear layer, and which way round it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks
from kernels_pallas.checks import ShapeError, TreeError

PyTree = Any
ORDERS = ("in_out", "out_in")


class MkorLayer(NamedTuple):
    """A linear layer s = W x + b among parameters.

    A path names a leaf by its keys, indices and fields, joined with "/": "blocks/0/w" is params["blocks"][0]["w"],
    "layers/0/weight" is model.layers[0].weight.
    """

    weight: str  # path of W
    bias: str | None = None  # path of b, of shape (out,)
    order: str = "in_out"  # x @ w (flax); "out_in" is w @ x (equinox, torch); further axes are inputs (convolutions)


class Found(NamedTuple):
    """A layer found among the leaves of a tree."""

    weight: int  # place among the leaves
    bias: int | None
    inputs: int  # of W alone
    outputs: int
    transposed: bool  # W lies (inputs, outputs)

    @property
    def columns(self) -> int:
        """Of [W, b]."""
        return self.inputs + (self.bias is not None)


Layers = Mapping[str, MkorLayer] | Callable[[PyTree], Mapping[str, MkorLayer]]


def mkor_layers(
    params: PyTree, weight: str, bias: str | None = None, *, order: str = "in_out", skip: tuple[str, ...] = ()
) -> dict[str, MkorLayer]:
    """Name the layers of a tree whose weights are all called alike: every leaf of that name with two axes.

    flax: `mkor_layers(variables["params"], "kernel", "bias")`, whose names are the paths of the modules. equinox:
    `mkor_layers(model, "weight", "bias", order="out_in")`. A plain tree: `mkor_layers(params, "w", "b")`.
    Where names do not tell, write the dict of `MkorLayer` by hand. A leaf is one layer: weights stacked for a loop over
    layers have three axes, and are passed over.

    Args:
      params: tree of arrays, or of anything with a shape, such as `jax.eval_shape` gives.
      weight: last part of the path of a weight.
      bias: last part of the path of a bias beside it, which a layer may lack; None looks for none.
      order: "in_out" where the model computes x @ w (flax), "out_in" where w @ x (equinox, torch).
      skip: names of layers to leave out, as the output layer of a large vocabulary, whose factors would be larger than
        itself.

    Returns:
      A dict from each layer's path ("" at the top of the tree) to its `MkorLayer`, in the order of the leaves.

    Raises:
      ValueError: no such leaf, an unknown order, or a name in `skip` that is no layer.

    Cost: one walk over the paths, on the host.

    Source: the layers of M. Mozaffari, S. Li, Z. Zhang, M. M. Dehnavi, "MKOR: Momentum-Enabled Kronecker-Factor-Based
    Optimizer Using Rank-1 Updates", 2023, arXiv 2306.01685, Algorithm 1; the names are ours.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": {"w": jnp.ones((3, 8)), "b": jnp.ones(8)}, "down": {"w": jnp.ones((8, 3))}}
      >>> mkor_layers(params, "w", "b")["up"]
      MkorLayer(weight='up/w', bias='up/b', order='in_out')
    """
    checks.choice("mkor_layers", "order", order, ORDERS)
    shapes = _shapes(params)
    layers = {}
    for path, shape in shapes.items():
        home, _, last = path.rpartition("/")
        beside = f"{home}/{bias}" if home else bias
        if last == weight and len(shape) == 2:
            layers[home] = MkorLayer(path, beside if bias is not None and beside in shapes else None, order)
    wanted = "name leaves of `params` with two axes"
    checks.value("mkor_layers", "weight", bool(layers), wanted, f"{weight!r} among {_some(shapes)}")
    for name in skip:
        checks.value("mkor_layers", "skip", name in layers, f"name layers among {_some(layers)}", repr(name))
    return {name: layer for name, layer in layers.items() if name not in skip}


def find(function: str, layers: Layers, params: PyTree) -> dict[str, Found]:
    """The places of the layers among the leaves of a tree.

    Raises:
      TypeError: `layers` is no dict of MkorLayer.
      TreeError: a path that no leaf has, or one leaf in two places.
      ShapeError: a weight with fewer than two axes, or a bias that does not fit it.
    """
    given = layers(params) if callable(layers) else layers
    remedy = "Make it with mkor_layers."
    checks.value(
        function,
        "layers",
        isinstance(given, Mapping),
        "be a dict of MkorLayer",
        type(given).__name__,
        remedy,
        TypeError,
    )
    shapes = _shapes(params)
    places = {path: i for i, path in enumerate(shapes)}
    found, taken = {}, set()
    for name, layer in given.items():
        at = f"layers[{name!r}]"
        checks.value(
            function, at, isinstance(layer, MkorLayer), "be an MkorLayer", type(layer).__name__, remedy, TypeError
        )
        checks.choice(function, at + ".order", layer.order, ORDERS)
        for part in ("weight", "bias"):
            path = getattr(layer, part)
            if path is not None or part == "weight":
                wanted = f"be the path of a leaf of `params`, {_some(shapes)}"
                checks.value(function, f"{at}.{part}", path in places, wanted, repr(path), error=TreeError)
                once = "be in one layer only"
                checks.value(function, f"{at}.{part}", path not in taken, once, repr(path), error=TreeError)
                taken.add(path)
        found[name] = _measured(function, at, layer, shapes, places)
    return found


def _measured(function: str, at: str, layer: MkorLayer, shapes: dict[str, Any], places: dict[str, int]) -> Found:
    shape = shapes[layer.weight]
    wanted = f"have two axes or more, as `{layer.weight}` is to be a matrix"
    checks.value(function, at + ".weight", len(shape) >= 2, wanted, f"shape {shape}", error=ShapeError)
    transposed = layer.order == "in_out"
    outputs = shape[-1] if transposed else shape[0]
    size = 1
    for axis in shape[:-1] if transposed else shape[1:]:
        size *= axis
    if layer.bias is not None:
        fits = shapes[layer.bias] == (outputs,)
        wanted = f"have shape ({outputs},) to match `{layer.weight}` {shape}, read as {layer.order}"
        remedy = "Set `order` to the other one, or bias=None."
        checks.value(function, at + ".bias", fits, wanted, shapes[layer.bias], remedy, ShapeError)
    bias = None if layer.bias is None else places[layer.bias]
    return Found(places[layer.weight], bias, size, outputs, transposed)


def matrix(layer: Found, leaves: list[jax.Array]) -> jax.Array:
    """[W, b] of a layer in at least float32.  [outputs, columns]"""
    weight = leaves[layer.weight]
    weight = weight.reshape(-1, layer.outputs).T if layer.transposed else weight.reshape(layer.outputs, -1)
    wide = weight.astype(accumulator(weight.dtype))
    if layer.bias is None:
        return wide
    return jnp.concatenate([wide, leaves[layer.bias][:, None].astype(wide.dtype)], axis=1)


def put(layer: Found, leaves: list[jax.Array], both: jax.Array) -> None:
    """Write [W, b] back over the leaves it came from, in their shapes and dtypes."""
    weight = both[:, : layer.inputs]
    weight = weight.T if layer.transposed else weight
    old = leaves[layer.weight]
    leaves[layer.weight] = weight.reshape(old.shape).astype(old.dtype)
    if layer.bias is not None:
        leaves[layer.bias] = both[:, layer.inputs].astype(leaves[layer.bias].dtype)


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves by path, in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(jnp.shape(leaf)) for path, leaf in leaves}


def _some(names: Any) -> str:
    """The first few names, for a sentence."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
