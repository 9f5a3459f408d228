"""Text files, tokenized and packed into rows of one length. Imports ``data``'s own modules above it."""
