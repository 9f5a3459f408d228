"""Heads with labels in place of a vocabulary, which several families have: their settings, layers and losses."""
