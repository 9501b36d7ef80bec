"""Cleans documents before they are tokenized: stages, duplicates, and the parts on disk that make it restartable."""
