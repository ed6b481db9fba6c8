"""devec on one graphics card, at the size of a 7B model: ``python -m benchmarks.gpu``."""
