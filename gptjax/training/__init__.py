"""The training step and the loop around it. Knows nothing of files of text or of checkpoints on disk."""
