"""All options: frozen dataclasses with the defaults, and the strict reader of YAML and flags."""
