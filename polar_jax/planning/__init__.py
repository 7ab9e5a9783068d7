"""Planning: memory, FLOPs and time of a run's steps, from compiling them ahead of time for hardware that is not present."""
