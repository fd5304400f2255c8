"""heed's JAX side: primitives, derivatives, sharding rules and FFI targets. Importing this package imports JAX."""
