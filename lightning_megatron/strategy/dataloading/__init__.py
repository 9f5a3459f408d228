"""Data loaders under the strategy: all ranks read the same amount, each sample is evaluated and predicted once."""
