"""Files of rollouts, of this package and of others: see `formats.read`."""
