"""What this machine is and can do: chips, processor, allocator, compiled programs. Knows nothing of models."""
