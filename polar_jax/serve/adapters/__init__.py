"""Reward functions for trainers, which call the reward server: one module per trainer. `examples/` shows how each is used."""
