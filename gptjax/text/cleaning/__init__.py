"""Cleans documents before tokenization: filters, deduplication, and restartable work in parts on disk."""
