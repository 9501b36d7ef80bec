"""C++ libraries for CPUs: the kernels that XLA calls, and the cache of large buffers."""
