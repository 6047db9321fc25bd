"""One file a method; each calls `benchmarks.registry.register` once."""
