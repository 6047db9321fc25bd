"""The one door for checks: what passes, what does not, and the sentence it leaves with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import checks


def sentence(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_errors_are_built_in_kinds():
    assert issubclass(checks.ShapeError, ValueError)
    assert issubclass(checks.DtypeError, TypeError)
    assert issubclass(checks.TreeError, ValueError)


def test_shape_binds_names_across_arguments():
    q, k = jnp.ones((2, 5, 3)), jnp.ones((2, 7, 3))
    assert checks.shape("f", q=(q, "*B T D"), k=(k, "*B S D")) == {"B": (2,), "T": 5, "D": 3, "S": 7}
    assert checks.shape("f", a=(None, "N"), b=(jnp.ones(4), "N")) == {"N": 4}
    assert checks.shape("f", a=(jnp.ones((4, 4)), "N N"), b=(jnp.ones((1, 9)), "N? _")) == {"N": 4}
    assert checks.shape("f", a=(jax.ShapeDtypeStruct((4,), "float32"), "4"), b=(jnp.ones(()), "")) == {}


def test_shape_sentences():
    square, b = jnp.ones((64, 64)), jnp.ones(63)
    text = sentence(checks.ShapeError, lambda: checks.shape("solve", A=(square, "N N"), b=(b, "N"), remedy="Use vmap."))
    assert text == "solve: `b` must have shape (64,) to match `A` (64, 64); got (63,). Use vmap."
    text = sentence(checks.ShapeError, lambda: checks.shape("f", a=(jnp.ones((2, 3)), "N N")))
    assert text == "f: `a` must have shape (N, N); got (2, 3)."
    text = sentence(checks.ShapeError, lambda: checks.shape("f", a=(jnp.ones(3), "2 _")))
    assert text == "f: `a` must have shape (2, _); got (3,)."
    text = sentence(checks.ShapeError, lambda: checks.shape("f", a=(jnp.ones(4), "N"), m=(jnp.ones(3), "N?")))
    assert text == "f: `m` must have shape (4 or 1,) to match `a` (4,); got (3,)."
    text = sentence(
        checks.ShapeError, lambda: checks.shape("f", x=(jnp.ones((2, 3, 4)), "*B K"), w=(jnp.ones((2, 4)), "*B"))
    )
    assert text == "f: `w` must have shape (2, 3) to match `x` (2, 3, 4); got (2, 4)."
    assert "`x` must have shape (*B, T, K)" in sentence(
        checks.ShapeError, lambda: checks.shape("f", x=(jnp.ones(3), "*B T K"))
    )


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        ("floating", 1.0, 1j, "a floating-point dtype"),
        ("inexact", 1j, 1, "a floating-point or complex dtype"),
        ("integer", 1, 1.0, "an integer dtype"),
        ("bool", True, 1, "dtype bool"),
        (["float32", "bfloat16"], jnp.bfloat16(1), jnp.float16(1), "one of the dtypes float32, bfloat16"),
    ],
)
def test_dtype(kind, good, bad, words):
    checks.dtype("f", kind, a=jnp.asarray(good), b=None)
    got = jnp.asarray(bad).dtype
    text = sentence(checks.DtypeError, lambda: checks.dtype("f", kind, a=jnp.asarray(bad), remedy="Cast it."))
    assert text == f"f: `a` must have {words}; got {got}. Cast it."


def test_same_dtype():
    a, b = jnp.ones(2), jnp.ones(3, jnp.bfloat16)
    checks.same_dtype("f", none=None, a=a, c=a)
    text = sentence(checks.DtypeError, lambda: checks.same_dtype("f", a=a, b=b))
    assert text == "f: `b` must have dtype float32 to match `a`; got bfloat16."


def test_same_tree():
    like = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}

    def check(tree, **options):
        return lambda: checks.same_tree("f", ("params", like), x=tree, **options)

    check(like)()
    check(jax.tree.map(lambda x: x.astype("bfloat16"), like))()
    text = sentence(checks.TreeError, check({"w": like["w"]}, remedy="Do so."))
    assert text == "f: `x` must have the tree structure of `params`, {'b': *, 'w': *}; got {'w': *}. Do so."
    text = sentence(checks.ShapeError, check(like | {"b": jnp.ones(1)}))
    assert text == "f: `x['b']` must have shape (3,) to match `params`; got (1,)."
    text = sentence(checks.DtypeError, check(like | {"b": jnp.ones(3, "bfloat16")}, dtypes=True))
    assert text == "f: `x['b']` must have dtype float32 to match `params`; got bfloat16."
    long = {f"a_rather_long_name_{i}": 0 for i in range(20)}
    assert sentence(checks.TreeError, check(long)).endswith("....")


def test_value_and_choice():
    checks.value("f", "n", True, "be positive", 1)
    checks.choice("f", "mode", "a", ("a", "b"))
    assert (
        sentence(ValueError, lambda: checks.value("f", "n", False, "be positive", 0))
        == "f: `n` must be positive; got 0."
    )
    assert sentence(KeyError, lambda: checks.value("f", "n", False, "exist", 0, "Add it.", KeyError))
    text = sentence(ValueError, lambda: checks.choice("f", "mode", "c", ("a", "b")))
    assert text == "f: `mode` must be one of 'a', 'b'; got 'c'."


def test_number():
    check = lambda got: lambda: checks.number("f", "n", lambda n: n >= 1, "be at least 1", got)  # noqa: E731
    for got in (1, 2.5, np.int64(3), jnp.float32(1), None, jnp.zeros(2)):
        check(got)()
    for got in (0, 0.5, np.int64(0), np.float32(0), jnp.zeros([])):
        assert sentence(ValueError, check(got)) == f"f: `n` must be at least 1; got {got}."
    jax.jit(lambda n: check(n)())(0)


def test_checks_run_while_tracing():
    @jax.jit
    def f(a, b):
        checks.shape("f", a=(a, "N"), b=(b, "N"))
        return a + b

    with pytest.raises(checks.ShapeError, match="`b` must have shape"):
        f(jnp.ones(3), jnp.ones(1))
