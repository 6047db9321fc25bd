"""jaxnum: functional numerics for JAX."""
