"""The machine: chips, processor, memory settings, compiled programs and C++ kernels; independent of models."""
