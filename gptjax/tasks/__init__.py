"""Training tasks, one per file: examples, loss, evaluation. Also selects the trainable parameters."""
