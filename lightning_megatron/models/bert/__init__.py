"""BERT: module, configuration, layer spec, and the heads, labels and losses of each task."""
