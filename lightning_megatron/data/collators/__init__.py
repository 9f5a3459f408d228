"""Functions that make a batch of samples: padding, masked tokens, corrupted spans, pairs of sentences."""
