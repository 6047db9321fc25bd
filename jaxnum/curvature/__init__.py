"""Curvature of a loss: products with its matrices, their spectra and traces, and estimates of their diagonals.

`hessian_product`, `gauss_newton_product`, `fisher_product` and `empirical_fisher_product` return linear maps v -> A v
on trees like the parameters; `lanczos`, `spectral_density`, `top_eigenvalue`, `hutchinson_trace` and
`hutchinson_diagonal` take such a map.
`hutchinson` and `gauss_newton_bartlett` are `optax.GradientTransformationExtraArgs` whose `update` returns an
estimate of the diagonal in place of the gradient; `jaxnum.transforms.sophia` and `optax.contrib.sophia` take either.
"""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.curvature._fisher_inverse import FisherInverse as FisherInverse
    from jaxnum.curvature._fisher_inverse import fisher_inverse as fisher_inverse
    from jaxnum.curvature._fisher_inverse import fisher_inverse_product as fisher_inverse_product
    from jaxnum.curvature._fisher_product import empirical_fisher_product as empirical_fisher_product
    from jaxnum.curvature._fisher_product import fisher_product as fisher_product
    from jaxnum.curvature._gauss_newton_bartlett import GaussNewtonBartlettState as GaussNewtonBartlettState
    from jaxnum.curvature._gauss_newton_bartlett import gauss_newton_bartlett as gauss_newton_bartlett
    from jaxnum.curvature._gauss_newton_product import gauss_newton_product as gauss_newton_product
    from jaxnum.curvature._hessian_product import hessian_product as hessian_product
    from jaxnum.curvature._hutchinson import HutchinsonState as HutchinsonState
    from jaxnum.curvature._hutchinson import hutchinson as hutchinson
    from jaxnum.curvature._hutchinson_diagonal import hutchinson_diagonal as hutchinson_diagonal
    from jaxnum.curvature._hutchinson_trace import hutchinson_trace as hutchinson_trace
    from jaxnum.curvature._lanczos import Lanczos as Lanczos
    from jaxnum.curvature._lanczos import lanczos as lanczos
    from jaxnum.curvature._spectral_density import SpectralDensity as SpectralDensity
    from jaxnum.curvature._spectral_density import spectral_density as spectral_density
    from jaxnum.curvature._top_eigenvalue import Eigenpair as Eigenpair
    from jaxnum.curvature._top_eigenvalue import top_eigenvalue as top_eigenvalue

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._fisher_inverse": ("FisherInverse", "fisher_inverse", "fisher_inverse_product"),
        "._fisher_product": ("empirical_fisher_product", "fisher_product"),
        "._gauss_newton_bartlett": ("GaussNewtonBartlettState", "gauss_newton_bartlett"),
        "._gauss_newton_product": ("gauss_newton_product",),
        "._hessian_product": ("hessian_product",),
        "._hutchinson": ("HutchinsonState", "hutchinson"),
        "._hutchinson_diagonal": ("hutchinson_diagonal",),
        "._hutchinson_trace": ("hutchinson_trace",),
        "._lanczos": ("Lanczos", "lanczos"),
        "._spectral_density": ("SpectralDensity", "spectral_density"),
        "._top_eigenvalue": ("Eigenpair", "top_eigenvalue"),
    },
)
