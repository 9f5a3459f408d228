"""Data sets of Hugging Face's ``datasets`` library: opened, tokenized, packed, and streamed from a place."""
