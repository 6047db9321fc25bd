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

from jaxnum.sequence._bidirectional import bidirectional
from jaxnum.sequence._diag_attention import diag_attention
from jaxnum.sequence._elu1 import elu1
from jaxnum.sequence._gated_delta_net import gated_delta_net
from jaxnum.sequence._hedgehog import hedgehog, hedgehog_distillation_loss
from jaxnum.sequence._lasp2 import lasp2, lasp2_hybrid_attention
from jaxnum.sequence._lightning_attention import lightning_attention, lightning_attention_slopes
from jaxnum.sequence._mamba_block import mamba_block
from jaxnum.sequence._norm_attention import norm_attention
from jaxnum.sequence._prefix_linear_attention import prefix_linear_attention
from jaxnum.sequence._retention import retention
from jaxnum.sequence._short_convolution import short_convolution, short_convolution_step
from jaxnum.sequence._srmsnorm import srmsnorm
from jaxnum.sequence._t2r import t2r
from jaxnum.sequence._taylor2 import taylor2
from jaxnum.sequence._transnormer_block import transnormer_block
from jaxnum.sequence.feature_map import FeatureMap
from jaxnum.sequence.layer import BidirectionalLayer, Layer

__all__ = [
    "BidirectionalLayer",
    "FeatureMap",
    "Layer",
    "bidirectional",
    "diag_attention",
    "elu1",
    "gated_delta_net",
    "hedgehog",
    "hedgehog_distillation_loss",
    "lasp2",
    "lasp2_hybrid_attention",
    "lightning_attention",
    "lightning_attention_slopes",
    "mamba_block",
    "norm_attention",
    "prefix_linear_attention",
    "retention",
    "short_convolution",
    "short_convolution_step",
    "srmsnorm",
    "t2r",
    "taylor2",
    "transnormer_block",
]
