"""Attention on a CPU with the blocks that the I/O model chooses, and how far they are from the best of a grid."""

import functools
import itertools
import statistics

import jax

from benchmarks import measure
from benchmarks.ops import attention
from benchmarks.registry import Params, Row, Target, register

GRID = (128, 256, 512, 1024, 2048)
ROUNDS = 7


def choice(params: Params):
    """What the model chooses for a parameter set."""
    import kernels_pallas

    return kernels_pallas.choose_attention_blocks(
        params["length"],
        params["length"],
        params["dim"],
        hardware="cpu",
        heads=params["batch"] * params["heads"],
        causal=params["causal"],
        method="model",
    )


def with_blocks(params: Params, blocks):
    import kernels_pallas

    return lambda q, k, v: kernels_pallas.attention(q, k, v, causal=params["causal"], block_sizes=blocks)


def run(params: Params):
    return with_blocks(params, choice(params).block_sizes)


def grid() -> dict[str, float]:
    """Time of the chosen blocks over the best time of a 5 x 5 grid, sampled in turn, causal and full, 4096 tokens."""
    figures = {}
    for name, params in SHAPES.items():
        chosen, seconds = _times(params)
        best = min((blocks for blocks in seconds if blocks != "chosen"), key=seconds.__getitem__)
        figures |= {
            f"over_best_{name}": seconds["chosen"] / seconds[best],
            f"chosen_q_{name}": chosen.block_sizes.q,
            f"chosen_kv_{name}": chosen.block_sizes.kv,
            f"best_q_{name}": best[0],
            f"best_kv_{name}": best[1],
            f"predicted_over_measured_{name}": chosen.seconds / seconds["chosen"],
        }
    figures["over_best"] = max(figures[f"over_best_{name}"] for name in SHAPES)
    return figures


def _times(params: Params) -> tuple:
    """The choice, and median seconds of it and of every pair of the grid."""
    import kernels_pallas

    inputs, chosen = attention.make(params), choice(params)
    functions = {"chosen": with_blocks(params, chosen.block_sizes)}
    for q, kv in itertools.product(GRID, repeat=2):
        functions[q, kv] = with_blocks(params, kernels_pallas.BlockSizes(q, kv, kv))
    calls = {name: functools.partial(jax.jit(function), *inputs) for name, function in functions.items()}
    samples = measure.interleave(calls, ROUNDS)
    return chosen, {name: statistics.median(times) for name, times in samples.items()}


SHAPES = {"causal_4096": attention.LONG | {"causal": True}, "full_4096": attention.LONG | {"causal": False}}

register(
    Row(
        name="choose_attention_blocks",
        covers=("choose_attention_blocks",),
        shapes=SHAPES,
        make=attention.make,
        run=run,
        reference=attention.reference,
        modes=("fwd",),
        tests=("tests/kernels_pallas/test_choose_attention_blocks.py", "tests/kernels_pallas/test_attention_io.py"),
        targets=(
            Target(
                "figure",
                1.2,
                "The blocks chosen for a CPU are within 20 % of the best of a 5 x 5 grid by time at 4096 tokens.",
                figure="over_best",
            ),
        ),
        figures={"grid": grid},
    )
)
