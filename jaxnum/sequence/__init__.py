"""Layers, attention variants and feature maps composed from the kernels of `kernels_pallas`.

A layer is four pure functions on pytrees, made by a factory as optax makes its transformations: `Layer` tells what they
take and give.

>>> import jax
>>> from jaxnum.sequence import transnormer_block
>>> layer = transnormer_block(32, heads=2)
>>> params = layer.init(jax.random.key(0))
>>> x = jax.random.normal(jax.random.key(1), (3, 10, 32))
>>> y, cache = layer.apply(params, x)  # a whole sequence
>>> y_next, cache = layer.step(params, x[:, 0], cache)  # one token more
>>> y.shape, y_next.shape
((3, 10, 32), (3, 32))

Parameters are dicts of arrays for optax; `jaxnum.interop` makes modules of flax and equinox from a layer. All layers
take packed documents and padding by `segment_ids`.
"""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.sequence._bidirectional import bidirectional as bidirectional
    from jaxnum.sequence._diag_attention import diag_attention as diag_attention
    from jaxnum.sequence._elu1 import elu1 as elu1
    from jaxnum.sequence._gated_delta_net import gated_delta_net as gated_delta_net
    from jaxnum.sequence._hedgehog import hedgehog as hedgehog
    from jaxnum.sequence._hedgehog import hedgehog_distillation_loss as hedgehog_distillation_loss
    from jaxnum.sequence._lasp2 import lasp2 as lasp2
    from jaxnum.sequence._lasp2 import lasp2_hybrid_attention as lasp2_hybrid_attention
    from jaxnum.sequence._lightning_attention import lightning_attention as lightning_attention
    from jaxnum.sequence._lightning_attention import lightning_attention_slopes as lightning_attention_slopes
    from jaxnum.sequence._mamba_block import mamba_block as mamba_block
    from jaxnum.sequence._norm_attention import norm_attention as norm_attention
    from jaxnum.sequence._prefix_linear_attention import prefix_linear_attention as prefix_linear_attention
    from jaxnum.sequence._retention import retention as retention
    from jaxnum.sequence._short_convolution import short_convolution as short_convolution
    from jaxnum.sequence._short_convolution import short_convolution_step as short_convolution_step
    from jaxnum.sequence._srmsnorm import srmsnorm as srmsnorm
    from jaxnum.sequence._t2r import t2r as t2r
    from jaxnum.sequence._taylor2 import taylor2 as taylor2
    from jaxnum.sequence._transnormer_block import transnormer_block as transnormer_block
    from jaxnum.sequence.feature_map import FeatureMap as FeatureMap
    from jaxnum.sequence.layer import BidirectionalLayer as BidirectionalLayer
    from jaxnum.sequence.layer import Layer as Layer

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._bidirectional": ("bidirectional",),
        "._diag_attention": ("diag_attention",),
        "._elu1": ("elu1",),
        "._gated_delta_net": ("gated_delta_net",),
        "._hedgehog": ("hedgehog", "hedgehog_distillation_loss"),
        "._lasp2": ("lasp2", "lasp2_hybrid_attention"),
        "._lightning_attention": ("lightning_attention", "lightning_attention_slopes"),
        "._mamba_block": ("mamba_block",),
        "._norm_attention": ("norm_attention",),
        "._prefix_linear_attention": ("prefix_linear_attention",),
        "._retention": ("retention",),
        "._short_convolution": ("short_convolution", "short_convolution_step"),
        "._srmsnorm": ("srmsnorm",),
        "._t2r": ("t2r",),
        "._taylor2": ("taylor2",),
        "._transnormer_block": ("transnormer_block",),
        ".feature_map": ("FeatureMap",),
        ".layer": ("BidirectionalLayer", "Layer"),
    },
)
