"""The device mesh, the sharding of every parameter, and runs of several processes."""
