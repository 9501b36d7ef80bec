"""Raw text → token shards on disk. No JAX here."""
