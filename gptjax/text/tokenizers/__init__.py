"""Tokenizers, one file a kind; `text/tokenizer.py` lists them."""
