"""The one door for shape, dtype and tree checks.

Every public entry of `kernels_pallas` and `jaxnum` checks its arguments here, at trace time. chex does the
testing; this file writes the sentence and picks the built-in exception. The sentence always has the same parts:
function, argument, wanted, got, remedy. chex is imported when the first check runs, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

PyTree = Any


class ShapeError(ValueError):
    """An argument has the wrong shape."""


class DtypeError(TypeError):
    """An argument has the wrong dtype."""


class TreeError(ValueError):
    """Two pytrees that must match do not."""


def shape(function: str, /, *, remedy: str = "", **arguments: tuple[Any, str]) -> dict[str, Any]:
    """Check shapes whose dimension names bind across arguments, and return the bound sizes.

    Args:
      function: name of the public function, first word of the error.
      remedy: one sentence that tells what to do.
      **arguments: `name=(array, spec)`. A spec is a string of dimensions separated by spaces: a name (`T`: binds,
        and must agree wherever it returns), an integer (exactly that size), `_` (anything), `T?` (the size of `T`
        or 1), and at most one `*B` (any number of leading dimensions, bound as a tuple). An argument that is
        `None` is passed over.

    Returns:
      Sizes by dimension name; `*B` is bound under `B` as a tuple.

    Raises:
      ShapeError: with the name of the first argument that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> shape("f", a=(jnp.ones((4, 3)), "N D"), b=(jnp.ones(4), "N"))
      {'N': 4, 'D': 3}
    """
    bound: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, (array, spec) in arguments.items():
        if array is None:
            continue
        got = tuple(jnp.shape(array))
        wanted = _wanted(got, spec, bound)
        if not _fits(array, wanted):
            clash = [
                f"`{origin[d]}` {tuple(jnp.shape(arguments[origin[d]][0]))}"
                for d in dict.fromkeys(token.strip("*?") for token in spec.split())
                if d in origin
            ]
            _raise(ShapeError, function, name, f"have shape {_show(spec, bound)}", got, remedy, clash)
        _bind(got, spec, bound, origin, name)
    return bound


def _wanted(got: tuple[int, ...], spec: str, bound: dict[str, Any]) -> list[Any] | None:
    """The shape chex should find: sizes, sets of sizes, or None for a free dimension; None if the rank is off."""
    wanted: list[Any] = []
    tokens = spec.split()
    free = len(got) - (len(tokens) - sum(t.startswith("*") for t in tokens))
    for token in tokens:
        if token.startswith("*"):
            if free < 0:
                return None
            wanted += list(bound.get(token[1:], (None,) * free))
        elif token == "_":
            wanted.append(None)
        elif token.isdigit():
            wanted.append(int(token))
        elif token.endswith("?"):
            size = bound.get(token[:-1])
            wanted.append(None if size is None else {1, size})
        else:
            wanted.append(bound.get(token))
    # A name that comes twice in one spec, as in a square matrix, binds at its first place.
    first: dict[str, int] = {}
    if len(wanted) == len(got) and not any(t.startswith("*") for t in tokens):
        for i, token in enumerate(tokens):
            if token in first and wanted[i] is None and token != "_":
                wanted[i] = got[first[token]]
            first.setdefault(token, i)
    return wanted


def _fits(array: Any, wanted: list[Any] | None) -> bool:
    import chex

    if wanted is None:
        return False
    try:
        chex.assert_shape(jax.ShapeDtypeStruct(jnp.shape(array), np.float32), tuple(wanted))
    except AssertionError:
        return False
    return True


def _bind(got: tuple[int, ...], spec: str, bound: dict, origin: dict, name: str) -> None:
    tokens = spec.split()
    free = len(got) - (len(tokens) - sum(t.startswith("*") for t in tokens))
    i = 0
    for token in tokens:
        if token.startswith("*"):
            if token[1:] not in bound:
                bound[token[1:]] = got[i : i + free]
                origin[token[1:]] = name
            i += free
            continue
        if token != "_" and not token.isdigit() and not token.endswith("?") and token not in bound:
            bound[token] = got[i]
            origin[token] = name
        i += 1


def _show(spec: str, bound: dict[str, Any]) -> str:
    shown: list[str] = []
    for token in spec.split():
        if token.startswith("*"):
            sizes = bound.get(token[1:])
            shown += [f"*{token[1:]}"] if sizes is None else [str(s) for s in sizes]
        elif token.endswith("?"):
            shown.append(f"{bound.get(token[:-1], token[:-1])} or 1")
        else:
            shown.append(str(bound.get(token, token)))
    return "(" + ", ".join(shown) + ("," if len(shown) == 1 else "") + ")"


_KINDS: dict[str, tuple[Any, str]] = {
    "floating": (jnp.floating, "a floating-point dtype"),
    "inexact": (jnp.inexact, "a floating-point or complex dtype"),
    "integer": (jnp.integer, "an integer dtype"),
    "bool": (jnp.bool_, "dtype bool"),
}


def dtype(function: str, kind: str | Sequence[Any], /, *, remedy: str = "", **arguments: Any) -> None:
    """Check that arrays have a dtype of one kind ("floating", "inexact", "integer", "bool") or of a list of dtypes.

    Raises:
      DtypeError: with the name of the first argument that does not fit.
    """
    for name, array in arguments.items():
        if array is None:
            continue
        got = jnp.result_type(array)
        if isinstance(kind, str):
            abstract, wanted = _KINDS[kind]
            ok = jnp.issubdtype(got, abstract)
        else:
            wanted = "one of the dtypes " + ", ".join(jnp.dtype(d).name for d in kind)
            ok = got in [jnp.dtype(d) for d in kind]
        if not ok:
            _raise(DtypeError, function, name, f"have {wanted}", got, remedy)


def same_dtype(function: str, /, *, remedy: str = "", **arguments: Any) -> None:
    """Check that all given arrays have the dtype of the first.

    Raises:
      DtypeError: with the name of the first argument that differs.
    """
    given = {name: array for name, array in arguments.items() if array is not None}
    first = next(iter(given))
    wanted = jnp.result_type(given[first])
    for name, array in given.items():
        if jnp.result_type(array) != wanted:
            want = f"have dtype {wanted} to match `{first}`"
            _raise(DtypeError, function, name, want, jnp.result_type(array), remedy)


def same_tree(
    function: str, reference: tuple[str, PyTree], /, *, dtypes: bool = False, remedy: str = "", **trees: PyTree
) -> None:
    """Check that trees have the structure and the leaf shapes (and, if asked, dtypes) of a reference tree.

    Args:
      function: name of the public function.
      reference: `(name, tree)` to compare with.
      dtypes: compare leaf dtypes too.
      remedy: one sentence that tells what to do.
      **trees: the trees to check, by argument name.

    Raises:
      TreeError: another structure; names where the two part.
      ShapeError: a leaf has another shape; names its path.
      DtypeError: a leaf has another dtype; names its path.
    """
    import chex

    other, wanted_tree = reference
    wanted_leaves, wanted_def = jax.tree_util.tree_flatten_with_path(wanted_tree)
    for name, tree in trees.items():
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        try:
            chex.assert_trees_all_equal_structs(wanted_tree, tree)
        except AssertionError:
            wanted = f"have the tree structure of `{other}`, {_treedef(wanted_def)}"
            _raise(TreeError, function, name, wanted, _treedef(treedef), remedy)
        for (path, want), (_, leaf) in zip(wanted_leaves, leaves, strict=True):
            at = name + jax.tree_util.keystr(path)
            if tuple(jnp.shape(want)) != tuple(jnp.shape(leaf)):
                wanted = f"have shape {tuple(jnp.shape(want))} to match `{other}`"
                _raise(ShapeError, function, at, wanted, tuple(jnp.shape(leaf)), remedy)
            if dtypes and jnp.result_type(want) != jnp.result_type(leaf):
                wanted = f"have dtype {jnp.result_type(want)} to match `{other}`"
                _raise(DtypeError, function, at, wanted, jnp.result_type(leaf), remedy)


def _treedef(treedef: Any) -> str:
    text = str(treedef).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) <= 120 else text[:117] + "..."


def value(
    function: str,
    argument: str,
    ok: bool,
    wanted: str,
    got: Any,
    remedy: str = "",
    error: Callable[[str], Exception] = ValueError,
) -> None:
    """Check a static (Python) value: raise `error` with the house sentence unless `ok`.

    Args:
      function: name of the public function.
      argument: name of the argument.
      ok: whether the value is acceptable.
      wanted: what follows "must", as in "be at least 1".
      got: the value as given.
      remedy: one sentence that tells what to do.
      error: class of the exception.

    Example:
      >>> value("picard", "damping", False, "be in (0, 1]", 3.0)
      Traceback (most recent call last):
      ...
      ValueError: picard: `damping` must be in (0, 1]; got 3.0.
    """
    if not ok:
        _raise(error, function, argument, wanted, got, remedy)


def number(function: str, argument: str, inside: Callable[[Any], Any], wanted: str, got: Any) -> None:
    """Check a single number, of Python, NumPy or JAX; None, what is traced and arrays of several pass.

    Args:
      function: name of the public function.
      argument: name of the argument.
      inside: whether a number is acceptable.
      wanted: what follows "must".
      got: the number as given.

    Raises:
      ValueError: a number that is not `inside`.

    Example:
      >>> number("f", "size", lambda size: size >= 1, "be at least 1", np.int64(0))
      Traceback (most recent call last):
      ...
      ValueError: f: `size` must be at least 1; got 0.
    """
    if got is not None and not traced(got) and np.size(got) == 1:
        value(function, argument, bool(inside(np.asarray(got).item())), wanted, got)


def arrays(function: str, /, **arguments: Any) -> None:
    """Check that arguments which have no default are arrays, of JAX or NumPy.

    Args:
      function: name of the public function.
      **arguments: `name=array`.

    Raises:
      TypeError: something else, None or a list included.

    Example:
      >>> arrays("f", k=None)
      Traceback (most recent call last):
      ...
      TypeError: f: `k` must be an array; got NoneType. Lists become arrays by jnp.asarray.
    """
    for name, given in arguments.items():
        known = hasattr(given, "shape") and hasattr(given, "dtype")
        remedy = "Lists become arrays by jnp.asarray."
        value(function, name, known, "be an array", type(given).__name__, remedy, TypeError)


def flag(function: str, argument: str, given: Any) -> bool:
    """Check a Python bool, which decides what is compiled, and return it."""
    value(function, argument, isinstance(given, (bool, np.bool_)), "be a Python bool", given)
    return bool(given)


def traced(got: Any) -> bool:
    """Whether a value is being traced, so that Python cannot read its number."""
    return isinstance(got, Tracer)


def choice(function: str, argument: str, got: Any, options: Sequence[Any]) -> None:
    """Check that a static value is one of a few options.

    Raises:
      ValueError: with the list of options.
    """
    if got not in options:
        _raise(ValueError, function, argument, "be one of " + ", ".join(repr(o) for o in options), repr(got), "")


def _raise(
    error: Callable[[str], Exception],
    function: str,
    argument: str,
    wanted: str,
    got: Any,
    remedy: str,
    others: Sequence[str] = (),
) -> NoReturn:
    match = " to match " + " and ".join(dict.fromkeys(others)) if others else ""
    text = f"{function}: `{argument}` must {wanted}{match}; got {got}."
    raise error(text + (f" {remedy}" if remedy else "")) from None
