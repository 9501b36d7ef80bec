"""The machine: chips, processor, memory settings, compiled programs and C++ kernels. Knows nothing about models."""
