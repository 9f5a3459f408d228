"""GPT: module, configuration, layer spec and what else belongs to causal models only."""
