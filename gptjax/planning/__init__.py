"""Memory, communication and time of a run on other machines: compiled for virtual devices, never run."""
