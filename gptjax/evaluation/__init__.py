"""Evaluation of a trained model: loss, perplexity, bits per byte, scores of labels."""
