"""The experiments: the only place that joins data, networks, objectives and training."""
