"""Lightning attention: causal linear attention whose decay is one constant a head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core.precision import accumulator
from jaxnum.sequence import layer as layers
from kernels_pallas import checks, linear_attention

_NAME = "lightning_attention"


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float = 1.0,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention with weights scale exp(-slope_h (t - s)) q_t . k_s, without softmax or normaliser.

    `kernels_pallas.linear_attention` with `log_decay` = -slopes.

    Args:
      q: queries [*B, T, H, K].
      k: keys [*B, T, H, K].
      v: values [*B, T, H, V].
      slopes: [H], >= 0; default `lightning_attention_slopes(H)`.
      initial_state: [*B, H, K, V], the state after the tokens before; default 0.
      segment_ids: int32 [*B, T], packed documents; negative is padding.
      scale: of q . k.
      chunk_size: tokens computed at once; only speed depends on it.
      implementation: as in `kernels_pallas.linear_attention`.

    Returns:
      o [*B, T, H, V] in the dtype of q, and the state after the last token [*B, H, K, V]. Decode on from it with
      `kernels_pallas.linear_attention_step` and the same `log_decay`.

    Raises:
      ShapeError, DtypeError, ValueError, NotImplementedError: as `kernels_pallas.linear_attention`.

    Numerics: the state is that after the last token. The paper's carries one decay more, that of the next token:
      multiply by exp(-slope) to have it. Without a normaliser o grows with T where slopes are small: norm it.

    Source: Z. Qin et al., "Lightning attention-2", 2024, arXiv 2401.04658; "Various lengths, constant speed", 2024,
      arXiv 2405.17381.

    Example:
      >>> import jax
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 4, 8))
      >>> o, state = lightning_attention(q, k, v)
      >>> o.shape, state.shape
      ((1, 100, 4, 8), (1, 4, 8, 8))
    """
    # Heads of q, k and v are checked by the kernel, which lets some be fewer.
    heads = max((x.shape[-2] for x in (q, k, v) if jnp.ndim(x) > 1), default=0)
    slopes = lightning_attention_slopes(max(heads, 1)) if slopes is None else slopes
    slopes = jnp.asarray(slopes)
    checks.shape(_NAME, slopes=(slopes, f"{heads}"))
    checks.dtype(_NAME, "floating", slopes=slopes)
    if not checks.traced(slopes):
        least = float(np.min(slopes, initial=0.0))
        checks.value(_NAME, "slopes", least >= 0, "be >= 0", least, "They are minus the logarithms of decays.")
    return linear_attention(
        q,
        k,
        v,
        log_decay=-slopes.astype(accumulator(jnp.result_type(q))),
        initial_state=initial_state,
        segment_ids=segment_ids,
        scale=scale,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def lightning_attention_slopes(
    heads: int, *, layer: int = 0, num_layers: int | None = None, kind: str = "geometric"
) -> jax.Array:
    """Slopes of the heads, smaller in deeper layers.

    "geometric", the slopes of ALiBi, which released models have: 2^(-8 (h + 1) / H) for H a power of two; else those of
    the power of two below H, then every second one of the power above. Layer l of L multiplies them by
    1 - l / (L - 1) + 1e-5, so that the last one hardly forgets. "linear", as the paper prints them: 8 h / H, which
    layer l of L multiplies by 1 - l / L.

    Args:
      heads: H, at least 1; h counts from 0.
      layer: l, from 0.
      num_layers: L; None leaves the factor out.
      kind: "geometric" or "linear".

    Returns:
      slopes [H].

    Raises:
      ValueError: a size is no positive int, or the layer is none of `num_layers`.

    Source: "geometric": O. Press et al., "Train short, test long", 2021, arXiv 2108.12409, with the factor of the
      released TransNormerLLM; "linear": Z. Qin et al., "Various lengths, constant speed", 2024, arXiv 2405.17381,
      equation 10.

    Example:
      >>> lightning_attention_slopes(3).tolist()
      [0.0625, 0.00390625, 0.25]
    """
    return jnp.asarray(slopes_of(heads, layer, num_layers, kind), float)


def slopes_of(heads: int, layer: int, num_layers: int | None, kind: str = "geometric") -> np.ndarray:
    """The same in NumPy, float64."""
    name = "lightning_attention_slopes"
    layers.check_sizes(name, {"heads": heads})
    checks.choice(name, "kind", kind, ("geometric", "linear"))
    inside = isinstance(layer, int) and 0 <= layer < (1 if num_layers is None else num_layers)
    wanted = "be 0 without `num_layers`" if num_layers is None else f"be an int in [0, {num_layers})"
    checks.value(name, "layer", inside, wanted, layer)
    if num_layers is not None:
        layers.check_sizes(name, {"num_layers": num_layers})
    if kind == "linear":
        return 8 * np.arange(heads) / heads * (1 - layer / (num_layers or 1))
    below = 2 ** (heads.bit_length() - 1)

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    slopes = np.concatenate([geometric(below), geometric(2 * below)[::2][: heads - below]])
    if num_layers is not None:
        slopes = slopes * (1 - layer / max(num_layers - 1, 1) + 1e-5)
    return slopes
