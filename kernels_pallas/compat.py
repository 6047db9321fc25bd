"""Every difference between the JAX releases that jaxnum supports, and nothing else."""
