"""Curvature of a loss: products with its matrices, their spectra and traces, and estimates of their diagonals.

`hessian_product`, `gauss_newton_product`, `fisher_product` and `empirical_fisher_product` return linear maps v -> A v
on trees like the parameters; `lanczos`, `spectral_density`, `top_eigenvalue`, `hutchinson_trace` and
`hutchinson_diagonal` take such a map.
`hutchinson` and `gauss_newton_bartlett` are `optax.GradientTransformationExtraArgs` whose `update` returns an
estimate of the diagonal in place of the gradient; `jaxnum.transforms.sophia` and `optax.contrib.sophia` take either.
"""

from jaxnum.curvature._fisher_product import empirical_fisher_product, fisher_product
from jaxnum.curvature._gauss_newton_bartlett import GaussNewtonBartlettState, gauss_newton_bartlett
from jaxnum.curvature._gauss_newton_product import gauss_newton_product
from jaxnum.curvature._hessian_product import hessian_product
from jaxnum.curvature._hutchinson import HutchinsonState, hutchinson
from jaxnum.curvature._hutchinson_diagonal import hutchinson_diagonal
from jaxnum.curvature._hutchinson_trace import hutchinson_trace
from jaxnum.curvature._lanczos import Lanczos, lanczos
from jaxnum.curvature._spectral_density import SpectralDensity, spectral_density
from jaxnum.curvature._top_eigenvalue import Eigenpair, top_eigenvalue

__all__ = [
    "Eigenpair",
    "GaussNewtonBartlettState",
    "HutchinsonState",
    "Lanczos",
    "SpectralDensity",
    "empirical_fisher_product",
    "fisher_product",
    "gauss_newton_bartlett",
    "gauss_newton_product",
    "hessian_product",
    "hutchinson",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "lanczos",
    "spectral_density",
    "top_eigenvalue",
]
