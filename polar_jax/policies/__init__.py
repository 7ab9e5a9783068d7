"""Evaluation of policies: log-likelihoods and responses in the conventions of lm-eval, and the benchmarks of the paper."""
