"""Curvature of a loss: estimates of the diagonal of its Hessian or Gauss-Newton matrix, as optax
transformations.

`hutchinson` and `gauss_newton_bartlett` are `optax.GradientTransformationExtraArgs` whose `update` returns an
estimate in place of the gradient; `jaxnum.transforms.sophia` and `optax.contrib.sophia` take either.
"""

from jaxnum.curvature._gauss_newton_bartlett import GaussNewtonBartlettState, gauss_newton_bartlett
from jaxnum.curvature._hutchinson import HutchinsonState, hutchinson

__all__ = ["GaussNewtonBartlettState", "HutchinsonState", "gauss_newton_bartlett", "hutchinson"]
