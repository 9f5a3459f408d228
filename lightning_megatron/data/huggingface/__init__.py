"""Data sets of Hugging Face's ``datasets`` library, which are opened, tokenized, packed and streamed here."""
