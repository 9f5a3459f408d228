"""T5: module, configuration, layer spec, and the split of encoder and decoder over pipeline stages."""
