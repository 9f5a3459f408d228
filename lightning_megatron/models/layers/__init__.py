"""Layers that several families share. Imports no family."""
