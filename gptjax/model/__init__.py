"""The decoder: the only Flax in the package. Everyone else sees `params`, a nested dict of arrays."""
