"""Adapters that let other libraries hold what jaxnum makes; each library is imported when its adapter is called.

Not imported by `jaxnum` itself: `from jaxnum.interop import to_flax`.
"""

from jaxnum.interop.equinox import to_equinox as to_equinox
from jaxnum.interop.flax import to_flax as to_flax
