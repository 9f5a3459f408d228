"""Values that a module logs: recorded for each micro-batch, reduced over ranks, and replayed for Lightning."""
