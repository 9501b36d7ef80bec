"""Kernels in C++ for processors."""
