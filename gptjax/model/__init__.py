"""The decoder. Only this package uses Flax; all others see `params`, a nested dict of arrays."""
