"""Run directories: writing, verifying and choosing checkpoints, and loading models from them."""
