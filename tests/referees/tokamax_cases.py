"""Tokamax's attention test classes with our function in the place of theirs; each case is theirs, word for word."""

from __future__ import annotations

import functools
import unittest
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

import kernels_pallas
from tests.referees.outcome import Outcome

# What their operation has and ours has not, and the cases that are about it.
NOT_OFFERED = {
    "test_quantized_": "quantised q, k and v",
    "test_dropout": "a dropout mask of the caller's: ours draws its own from a seed",
    "test_normalize_output": "an output that is not divided by the sum of its weights",
}
# Their class skips some cases for every operation. Those that it skips for their time are run here all the same; others
# it skips for bugs, and their dense reference would need 34 GB.
_SKIPPED_FOR_TIME = "Too slow for OSS"


# One device, then inputs split over several.
CLASSES = ("AttentionTestBase", "AttentionManualPartitioningTestBase")


def run(name: str) -> Outcome:
    """Run the cases of one of their classes."""
    from tokamax._src.ops.attention import base, test_base

    cases = getattr(test_base, name)
    return _run(_with(cases, _ours()), _with(cases, base.DotProductAttention()))


def _with(cases: type, operation: Callable) -> type:
    """Their class, with the operation that it is to test."""

    class Judge(cases):
        def __init__(self, name: str) -> None:
            super().__init__(name, attention_fn=operation)

        def skipTest(self, reason: str) -> None:
            if reason != _SKIPPED_FOR_TIME:
                super().skipTest(reason)

    return Judge


def _run(ours: type, theirs: type) -> Outcome:
    outcome = Outcome()
    for name in unittest.TestLoader().getTestCaseNames(ours):
        missing = [reason for part, reason in NOT_OFFERED.items() if part in name]
        if missing:
            outcome.not_applicable[name] = missing[0]
            continue
        result = _result(ours, name)
        if result.skipped:
            outcome.not_applicable[name] = f"skipped by its own class: {result.skipped[0][1]}"
        elif result.wasSuccessful():
            outcome.passed.append(name)
        else:
            # Some ask for equal bits on one device and on several.
            bucket = outcome.failed if _result(theirs, name).wasSuccessful() else outcome.failed_by_both
            bucket[name] = (result.errors + result.failures)[0][1].strip()[-600:]
    return outcome


def _result(cases: type, name: str) -> unittest.TestResult:
    result = unittest.TestResult()
    cases(name).run(result)
    return result


def _ours() -> Any:
    """Tokamax's operation with our function inside: it splits over devices and checks its arguments as theirs does."""
    from tokamax._src.ops.attention import base

    class Attention(base.DotProductAttention):
        # Their own derivative of a derivative would stand between the test and ours.
        supports_batched_args_capture = False

        # Their signature: the arguments are written into the program's text by their types.
        @functools.wraps(base.DotProductAttention._fwd)
        def _fwd(
            self, q, k, v, *, precision, logits_dtype, logits_scale, bias, logits_soft_cap, mask, dropout_mask,
            dropout_rate, paging_info, q_indices, k_indices, normalize_output, return_residuals, config,
        ):  # fmt: skip
            del precision, logits_dtype, config  # Ours are float32 throughout, whatever less is asked for.
            if dropout_mask is not None or dropout_rate or paging_info is not None:
                raise NotImplementedError("a dropout mask and pages are not arguments of attention")
            if not normalize_output and not return_residuals:
                raise NotImplementedError("attention has no output that is not normalised")
            flags, dense = _flags(q, k, mask, q_indices, k_indices)
            o, lse = kernels_pallas.attention(
                q, k, v, bias=_shared(bias, q, k), mask=_shared(dense, q, k), soft_cap=logits_soft_cap,
                scale=logits_scale, return_lse=True, implementation="xla", **flags,
            )  # fmt: skip
            # Sums of exp(s - lse) are 1: beside these residuals an output is normalised and unnormalised at once.
            return o, (lse, jnp.ones_like(lse)) if return_residuals else None

    return Attention()


def _flags(q: Any, k: Any, mask: Any, q_indices: Any, k_indices: Any) -> tuple[dict[str, Any], Any]:
    """Our flags for what they can say of their mask, and a dense mask for the rest."""
    mask, band = mask.take("causal_mask")
    lengths = (q.shape[-3] if q_indices is None else q_indices, k.shape[-3] if k_indices is None else k_indices)
    dense = mask.as_array(*lengths)
    flags: dict[str, Any] = {}
    if band is not None:
        flags = {"causal": True, "window": None if band.window_size is None else (band.window_size - 1, None)}
        flags |= {"q_positions": _positions(lengths[0], q) + band.offset, "kv_positions": _positions(lengths[1], k)}
    return flags, dense


def _positions(length_or_indices: Any, x: Any) -> Any:
    """Positions [length] or [*batch, length]; theirs have an axis of heads, where all share one row."""
    if isinstance(length_or_indices, int):
        return jnp.arange(length_or_indices)
    if length_or_indices.ndim > 1 and length_or_indices.shape[-2] > 1:
        raise NotImplementedError("attention has one row of positions for all heads")
    return jnp.broadcast_to(length_or_indices[..., 0, :], x.shape[:-2])


def _shared(x: Any, q: Any, k: Any) -> Any:
    """As many axes as ours wants, and all the keys."""
    if x is None:
        return None
    x = x.reshape((1,) * (q.ndim - x.ndim) + x.shape)
    keys = k.shape[-3] if x.shape[-1] == 1 else x.shape[-1]
    return jnp.broadcast_to(x, (*x.shape[:-1], keys))
