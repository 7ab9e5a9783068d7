"""The page at the root of the server, for people who want to see what the reward model does."""
