"""Experts: feed-forward layers of which each token uses a few; their settings, router and layers."""
