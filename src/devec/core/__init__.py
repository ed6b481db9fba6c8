"""Nouns and contracts. Nothing here opens a file; nothing here knows a command line."""
