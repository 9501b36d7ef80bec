"""The optimizer step, checkpoints, and the loop that ties the parts together."""
