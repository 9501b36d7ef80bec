"""One file per command. `cli.py` parses the arguments and calls them; they can also be called from Python."""
