"""A run directory and what is safe in it: writing, verifying and choosing checkpoints, loading models from them."""
