"""heed's JAX side: the primitive, its sharding rules and its FFI target. Importing this package imports JAX."""
