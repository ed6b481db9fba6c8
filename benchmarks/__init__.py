"""Seconds against the literal recipe, with the machine recorded: ``make bench``, or ``python -m benchmarks --help``."""
