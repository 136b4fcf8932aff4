"""Making rollouts: prefix-grouped decoding, and tasks that score what was sampled."""
