"""Tensors in, tensors out. Imports torch and numpy only; knows nothing of names, files or models."""
