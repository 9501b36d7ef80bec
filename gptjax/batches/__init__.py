"""Token shards → batches, with NumPy only. No JAX here."""
