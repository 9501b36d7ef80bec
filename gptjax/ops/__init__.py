"""Pure functions on arrays: each a plain reference and its fast paths, chosen by platform."""
