"""Tiny models and a runner of the command, shared by the tests of this folder."""

from fixtures_models import devec, gpt2, llama, work

__all__ = ["devec", "gpt2", "llama", "work"]
