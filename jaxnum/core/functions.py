"""User functions as pytrees: traced once, captured arrays hoisted to leaves, equal programs interned.

A fresh lambda with the same program is then the same static object, so that a second eager call compiles nothing,
and derivatives with respect to captured arrays flow, because these are leaves of the problem.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

PyTree = Any


@partial(jax.tree_util.register_dataclass, data_fields=["consts"], meta_fields=["fn"])
@dataclass(frozen=True)
class Function:
    """A function and the arrays it captured. `fn` is static; `consts` are leaves, or None before tracing."""

    fn: Any
    consts: Any = None

    def __call__(self, *args: PyTree) -> PyTree:
        """Value of the function; the captured arrays come from the leaves."""
        return self.fn(*args) if self.consts is None else self.fn(self.consts, *args)


@partial(jax.tree_util.register_dataclass, data_fields=["consts"], meta_fields=["fn"])
@dataclass(frozen=True)
class SizedFunction(Function):
    """A function of (x, indices, ...) traced at several lengths of `indices`, since a program has one shape.

    `fn` holds the lengths, `consts` one traced Function for each.
    """

    def __call__(self, x: PyTree, indices: jax.Array, *args: PyTree) -> PyTree:
        """Value of the function, at one of the lengths."""
        return self.consts[self.fn.index(indices.shape[0])](x, indices, *args)


def as_function(fn: Any) -> Any:
    """Wrap a raw callable; anything else (None, a traced Function, a placeholder of tree code) passes."""
    return Function(fn) if callable(fn) and not isinstance(fn, Function) else fn


def trace(function: Function | None, *examples: PyTree) -> Function | None:
    """Trace a wrapped callable on example arguments, hoist its captured arrays, and intern the program.

    Args:
      function: what `as_function` returned; a function that is traced already is returned as it is.
      *examples: arguments with the shapes and dtypes that the solve will use.

    Returns:
      A Function whose `fn` is one object for all callables with the same program.
    """
    if function is None or function.consts is not None:
        return function
    closed, out_shape = jax.make_jaxpr(function.fn, return_shape=True)(*examples)
    program = _Program(closed.jaxpr, jax.tree.structure(examples), jax.tree.structure(out_shape), len(closed.consts))
    key = (_fingerprint(closed.jaxpr, function.fn), program.in_tree, program.out_tree)
    return Function(_interned(key, program), tuple(closed.consts))


def trace_sizes(function: Function, x: PyTree, sizes: tuple[int, ...], *args: PyTree) -> Function:
    """Trace a function of (x, indices, *args) as `trace` does, at int32 indices of each of these lengths."""
    if function.consts is not None:
        return function
    programs = tuple(trace(function, x, jnp.zeros((size,), jnp.int32), *args) for size in sizes)
    return SizedFunction(sizes, programs)


class _Program:
    """A jaxpr called with its captured arrays first; compared by identity, shared through the intern table."""

    def __init__(self, jaxpr: Any, in_tree: Any, out_tree: Any, num_consts: int):
        self.in_tree = in_tree
        self.out_tree = out_tree
        self._avals = [v.aval for v in jaxpr.invars]
        self._call = lambda consts, *flat: jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))(*flat)

    def __call__(self, consts: tuple, *args: PyTree) -> PyTree:
        flat, in_tree = jax.tree.flatten(args)
        if in_tree != self.in_tree:
            raise TypeError(f"a traced function was called with another tree: wanted {self.in_tree}, got {in_tree}")
        flat = [
            jax.lax.convert_element_type(x, a.dtype) if _numeric(a) else x
            for x, a in zip(flat, self._avals, strict=True)
        ]
        return jax.tree.unflatten(self.out_tree, self._call(consts, *flat))


def _numeric(aval: Any) -> bool:
    return not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


_TABLE: OrderedDict[Any, _Program] = OrderedDict()
_TABLE_SIZE = 1024  # an evicted program only costs one retrace
_LOCK = threading.Lock()


def _interned(key: Any, program: _Program) -> _Program:
    with _LOCK:
        found = _TABLE.setdefault(key, program)
        _TABLE.move_to_end(key)
        if len(_TABLE) > _TABLE_SIZE:
            _TABLE.popitem(last=False)
    return found


def _fingerprint(jaxpr: Any, fn: Callable) -> Any:
    """A hashable value equal for jaxprs that are the same program.

    The derivative rules of custom_jvp and custom_vjp calls hide in objects that every trace makes anew. When a
    program holds such calls, its source (code object, what it closes over, what globals it names) joins the key, and
    stands for the rules.
    """
    custom: list[bool] = []
    key = _jaxpr_key(jaxpr, custom)
    return (key, _source_key(fn, depth=0)) if custom else key


def _jaxpr_key(jaxpr: Any, custom: list[bool]) -> Any:
    number: dict[Any, int] = {}

    def atom(v: Any) -> Any:
        if isinstance(v, jex.Literal):
            return ("literal", str(v.aval), np.asarray(v.val).tobytes())
        return number.setdefault(v, len(number))

    def variable(v: Any) -> Any:
        return (atom(v), _Hashed(v.aval))

    equations = []
    binders = tuple(variable(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    for eqn in jaxpr.eqns:
        rules = eqn.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call"))
        custom += [True] * rules
        params = tuple(
            (name, _value_key(value, custom))
            for name, value in sorted(eqn.params.items())
            if not (rules and name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"))
        )
        inputs = tuple(atom(v) for v in eqn.invars)
        equations.append(
            (
                eqn.primitive.name,
                _Hashed(eqn.primitive),
                params,
                inputs,
                tuple(variable(v) for v in eqn.outvars),
            )
        )
    return (binders, tuple(equations), tuple(atom(v) for v in jaxpr.outvars))


def _value_key(value: Any, custom: list[bool]) -> Any:
    if isinstance(value, jex.ClosedJaxpr):
        consts = tuple(_Identity(c) for c in value.consts)
        return (_jaxpr_key(value.jaxpr, custom), consts)
    if isinstance(value, jex.Jaxpr):
        return _jaxpr_key(value, custom)
    if isinstance(value, (tuple, list)):
        return tuple(_value_key(v, custom) for v in value)
    if isinstance(value, dict):
        return tuple((k, _value_key(v, custom)) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    return _Hashed(value)


def _source_key(value: Any, depth: int) -> Any:
    """What a Python function is made of, as far as it can be seen; objects that cannot be seen through by identity."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return ("array", jnp.shape(value), str(jnp.result_type(value)))
    if depth < 4 and isinstance(value, partial):
        parts = (value.func, *value.args, *sorted(value.keywords.items()))
        return tuple(_source_key(p, depth + 1) for p in parts)
    if isinstance(value, tuple):
        return tuple(_source_key(v, depth) for v in value)
    code = getattr(value, "__code__", None)
    if code is None or depth >= 4:
        return _Hashed(value)
    cells = tuple(_source_key(c.cell_contents, depth + 1) for c in value.__closure__ or ())
    named = tuple(_Identity(value.__globals__.get(n)) for n in code.co_names if n in value.__globals__)
    bound = _Identity(getattr(value, "__self__", None))
    return (_Identity(code), bound, cells, named, _source_key(value.__defaults__ or (), depth + 1))


class _Identity:
    """Compares an object by identity and keeps it alive, so that its address is not reused."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


class _Hashed:
    """Compares by type and value where the object can be hashed, by identity where it cannot."""

    def __init__(self, value: Any):
        self.value = value
        try:
            self.key = hash(value)
            self.by_value = True
        except TypeError:
            self.key = id(value)
            self.by_value = False

    def __hash__(self) -> int:
        return self.key

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, _Hashed) or type(self.value) is not type(other.value):
            return False
        return bool(self.value == other.value) if self.by_value else self.value is other.value
