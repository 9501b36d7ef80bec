"""Text from a trained model: decoding with a cache, choosing tokens, streaming."""
