"""Accelerator kernels for JAX, each one call with an implementation per platform."""
