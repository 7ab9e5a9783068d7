"""What a run would need of a machine that is not there: its steps, compiled ahead and read."""
