"""One call, one implementation per platform, chosen when a program is lowered.

A primitive with a lowering rule per platform, and not `jax.lax.platform_dependent`: one function that holds Pallas
branches then exports for cpu, tpu and cuda together. The rules of differentiation sit above: an operation wraps its
primitives in `jax.custom_vjp`, and its inputs in `refuse_forward_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec, get_abstract_mesh

PyTree = Any
Implementation = Callable[..., tuple[jax.Array, ...]]

# Names of platforms as the lowering knows them.
_PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}


def primitive(
    name: str,
    *,
    shapes: Callable[..., tuple[jax.ShapeDtypeStruct, ...]],
    xla: Mapping[str, Implementation],
    accelerated: Mapping[str, Implementation],
    unsupported: Mapping[str, Callable[..., str | None]],
    shareable: Callable[..., PyTree],
) -> Callable[..., list[jax.Array]]:
    """A call whose implementation is chosen by the platform it is lowered for.

    Args:
      name: of the primitive, as it shows in jaxprs.
      shapes: `shapes(static, operands)`, the outputs.
      xla: the portable implementation: `"default"`, and by platform name ("cpu", ...) where it differs.
      accelerated: kernels by implementation name ("tpu", "gpu"); each takes (static, operands) like the others.
      unsupported: by implementation name, `unsupported(static, operands)` gives the reason why a kernel cannot do a
        call, or None.
      shareable: `shareable(static, operands)`, a tree like the operands of bools: whether a leaf may have 1 in place of
        the batch because the whole batch shares it. A leaf whose cotangent is an output may not.

    Returns:
      `call(implementation, static, operands)`; static is hashable, operands a pytree of arrays whose every leaf has
      the batch as its first axis. Under vmap the mapped axis joins the batch. The result is a flat list of arrays,
      each with the batch first.
    """
    prim = jex.Primitive(name)
    prim.multiple_results = True

    def abstract(*leaves: Any, implementation: str | None, static: Any, tree: Any) -> list[Any]:
        outputs = shapes(static, jax.tree.unflatten(tree, leaves))
        manual = ManualAxisType(varying=_union(leaves))
        whole = [NamedSharding(get_abstract_mesh(), PartitionSpec(*(None,) * len(out.shape))) for out in outputs]
        return [
            ShapedArray(out.shape, out.dtype, sharding=sharding, manual_axis_type=manual)
            for out, sharding in zip(outputs, whole, strict=True)
        ]

    def runner(run: Implementation) -> Callable[..., list[jax.Array]]:
        def unflattened(*leaves: jax.Array, implementation: str | None, static: Any, tree: Any) -> list[jax.Array]:
            return list(run(static, jax.tree.unflatten(tree, leaves)))

        return unflattened

    def rule(platform: str, portable: Implementation) -> Callable:
        own = next((key for key in accelerated if _PLATFORMS[key] == platform), None)
        rules = {"xla": mlir.lower_fun(runner(portable), multiple_results=True)}
        if own is not None:
            rules[own] = mlir.lower_fun(runner(accelerated[own]), multiple_results=True)

        def lower(ctx: Any, *leaves: Any, implementation: str | None, static: Any, tree: Any) -> Any:
            chosen = implementation
            if chosen is None:
                operands = jax.tree.unflatten(tree, ctx.avals_in)
                able = own is not None and _on_one_device(ctx) and unsupported[own](static, operands) is None
                chosen = own if able else "xla"
            if chosen not in rules:
                raise NotImplementedError(
                    f"{name}: implementation {chosen!r} does not run on {platform}. "
                    "Use implementation=None, which chooses by platform, or 'xla', which runs everywhere."
                )
            if chosen == own and not _on_one_device(ctx):
                raise NotImplementedError(
                    f"{name}: implementation {chosen!r} cannot be divided over devices by the compiler. Call it inside "
                    "jax.shard_map, or use implementation=None, which falls back to 'xla'."
                )
            # Devices differ in what they hold, not in what they do: an implementation sees arrays as on one device.
            local = [aval.update(manual_axis_type=ManualAxisType()) for aval in ctx.avals_in]
            ctx = ctx.replace(avals_in=local)
            return rules[chosen](ctx, *leaves, implementation=implementation, static=static, tree=tree)

        return lower

    def batch(leaves: tuple, axes: tuple, *, implementation: str | None, static: Any, tree: Any) -> tuple:
        may_share = jax.tree.leaves(shareable(static, jax.tree.unflatten(tree, leaves)))
        merged, size = _merge(leaves, axes, may_share)
        outputs = prim.bind(*merged, implementation=implementation, static=static, tree=tree)
        lane = [_without(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)]
        wanted = shapes(static, jax.tree.unflatten(tree, lane))
        split = [_split(out, size, like.shape[0]) for out, like in zip(outputs, wanted, strict=True)]
        return split, [0] * len(outputs)

    @lru_cache(maxsize=1024)
    def eager(implementation: str | None, static: Any, tree: Any) -> Callable:
        return jax.jit(lambda *leaves: prim.bind(*leaves, implementation=implementation, static=static, tree=tree))

    prim.def_abstract_eval(abstract)

    def run(*leaves: Any, implementation: str | None, static: Any, tree: Any) -> Any:
        # What is compiled here is this primitive: with jit off it would call itself.
        with jax.disable_jit(False):
            return eager(implementation, static, tree)(*leaves)

    prim.def_impl(run)
    batching.primitive_batchers[prim] = batch
    mlir.register_lowering(prim, rule("this platform", xla["default"]))
    for platform in {"cpu", *_PLATFORMS.values()}:
        mlir.register_lowering(prim, rule(platform, xla.get(platform, xla["default"])), platform=platform)

    def call(implementation: str | None, static: Any, operands: PyTree) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(align(operands))
        return prim.bind(*leaves, implementation=implementation, static=static, tree=tree)

    return call


def _on_one_device(ctx: Any) -> bool:
    """Whether what is lowered runs as it stands on each device: there is one, or all axes of the mesh are manual."""
    context = ctx.module_context.axis_context
    manual = getattr(context, "manual_axes", None)
    if manual is not None:
        return manual == frozenset(context.mesh.axis_names)
    return (getattr(context, "num_devices", None) or 1) == 1


def check_implementation(
    name: str, implementation: str | None, unsupported: dict[str, Callable], static: Any, operands: PyTree, over: str
) -> None:
    """Raise with the reason when an implementation cannot do a call.

    Args:
      name: of the public function.
      implementation: as given.
      unsupported: by implementation, `unsupported(static, operands)` gives the reason, or None.
      static: static part of the call.
      operands: arrays of the call.
      over: axes that the call may be divided over.

    Raises:
      NotImplementedError: a named implementation cannot do this call, or anything but the reference is to take arrays
        on a mesh of explicit axes.
    """
    if implementation != "reference" and any(map(_explicitly_sharded, jax.tree.leaves(operands))):
        raise NotImplementedError(
            f"{name}: explicitly sharded arrays are served by implementation='reference' only. "
            f"Call it inside jax.shard_map over {over}, or use a mesh of automatic axes."
        )
    refuse_unsupported(name, implementation, unsupported, static, operands)


def refuse_unsupported(
    name: str, implementation: str | None, unsupported: dict[str, Callable], static: Any, operands: PyTree
) -> None:
    """Raise with the reason when a named kernel cannot do a call; see `check_implementation`."""
    reason = unsupported[implementation](static, operands) if implementation in unsupported else None
    if reason:
        raise NotImplementedError(
            f"{name}: implementation {implementation!r} cannot do this call: {reason}. "
            "Use implementation=None, which falls back to 'xla'."
        )


def _explicitly_sharded(x: jax.Array) -> bool:
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding is not None and any(axis is not None for axis in sharding.spec)


def not_hopper() -> str | None:
    """Why Mosaic GPU kernels, whose products are Hopper's, cannot run on this machine's GPUs; None where it has none.

    A program lowered on a machine without a GPU, as for export, is for Hopper.
    """
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return None
    capabilities = sorted({str(device.compute_capability) for device in devices} - {"9.0"})
    return f"it needs Hopper GPUs, of compute capability 9.0, not {capabilities[0]}" if capabilities else None


def _merge(leaves: tuple, axes: tuple, may_share: list[bool]) -> tuple[list[jax.Array], int]:
    """Join a mapped axis with the batch axis that every operand has first; what the whole batch shares stays shared."""
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
    moved = [leaf if axis is None else jnp.moveaxis(leaf, axis, 0) for leaf, axis in zip(leaves, axes, strict=True)]
    lead = max(leaf.shape[0 if axis is None else 1] for leaf, axis in zip(moved, axes, strict=True))
    merged = []
    for leaf, axis, shared in zip(moved, axes, may_share, strict=True):
        if axis is None and shared and leaf.shape[0] == 1:
            merged.append(leaf)
            continue
        spread = leaf[None] if axis is None else leaf
        spread = jnp.broadcast_to(spread, (size, lead, *spread.shape[2:]))
        merged.append(spread.reshape(size * lead, *spread.shape[2:]))
    return merged, size


def _without(leaf: jax.Array, axis: int | None) -> jax.ShapeDtypeStruct:
    shape = leaf.shape if axis is None else leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def _split(out: jax.Array, size: int, batch: int) -> jax.Array:
    """The mapped axis and the batch of one lane again; the cotangent of what a lane's whole batch shares is a sum."""
    out = out.reshape(size, -1, *out.shape[1:])
    return jnp.sum(out, axis=1, keepdims=True) if batch == 1 else out


# --- Mesh axes. -------------------------------------------------------------------------------------------------------


def align(operands: PyTree) -> PyTree:
    """The arrays of a call, all varying over the same mesh axes; outside `jax.shard_map` they stay as they are.

    Inside `jax.shard_map` the type of an array says over which mesh axes it differs from device to device. The result
    of a call differs over the union of these, and so do the cotangents that a custom_vjp returns, which must have the
    types of its inputs. So the inputs are cast to the union before the custom_vjp, and JAX transposes the cast: the
    cotangent of an array that devices share is summed over them.

    Args:
      operands: pytree of arrays.
    """
    leaves, tree = jax.tree.flatten(operands)
    types = [jax.typeof(x) for x in leaves]
    union = _union(types)

    # In a fixed order, so that every process of a job traces the same program.
    missing = [tuple(sorted(union - of.mat.varying, key=str)) for of in types]
    cast = [jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(leaves, missing, strict=True)]
    return jax.tree.unflatten(tree, cast)


def output(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An output of `pl.pallas_call` as it is inside an implementation, where nothing varies over mesh axes.

    Under `jax.shard_map` Pallas takes no output that says nothing about mesh axes.

    Args:
      shape: of the output.
      dtype: of the output.
    """
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType())


def _union(types: Any) -> frozenset:
    return frozenset().union(*(of.mat.varying for of in types))


# --- Forward mode. ----------------------------------------------------------------------------------------------------

_forward_p = jex.Primitive("forward_mode")


def refuse_forward_mode(name: str, operands: PyTree) -> PyTree:
    """The operands unchanged; forward-mode differentiation through them raises one sentence that names the remedy.

    A custom_vjp has no forward derivative, and says so in words that name neither the function nor the way out.
    Reverse mode, alone or over reverse mode, passes.

    Args:
      name: of the public function.
      operands: pytree of arrays.
    """
    leaves, tree = jax.tree.flatten(operands)
    return jax.tree.unflatten(tree, [_identity(name, x) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _identity(name: str, x: jax.Array) -> jax.Array:
    return x


@_identity.defjvp
def _identity_jvp(name: str, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # Linear, and its transpose is the identity: reverse mode never evaluates it, forward mode does. The guard is in the
    # primal output too, where an outer derivative passes.
    return _identity(name, primals[0]), _forward_p.bind(tangents[0], name=name)


def _refuse(*_: Any, name: str, **__: Any) -> Any:
    raise TypeError(
        f"{name}: forward-mode differentiation (jax.jvp, jax.jacfwd, jax.linearize, jax.hessian) works through "
        f"implementation='reference' only. Use reverse mode (jax.vjp, jax.grad, jax.jacrev), for a Hessian "
        f"jax.jacrev(jax.grad(f)), or pass implementation='reference'."
    )


_forward_p.def_impl(_refuse)
_forward_p.def_abstract_eval(lambda x, *, name: x)
ad.deflinear(_forward_p, lambda cotangent, *, name: [cotangent])
batching.primitive_batchers[_forward_p] = lambda xs, axes, *, name: (_forward_p.bind(xs[0], name=name), axes[0])
mlir.register_lowering(_forward_p, _refuse)
