"""One file a command: what `cli.py` calls once it has read the arguments. Each can be called from Python."""
