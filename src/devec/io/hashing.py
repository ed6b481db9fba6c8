"""Which hash is for what.

Tensors are hashed with BLAKE3 while they pass: by the terabyte, on the cores that also do the work, where SHA-256 costs
more than a merge's arithmetic. Finished files are hashed with SHA-256, because that is what other people's tools check.
"""

from __future__ import annotations

from blake3 import blake3

TENSOR_HASH = "blake3"
"""What records call a tensor's hash."""


def tensor_hash() -> blake3:
    """A running hash of a tensor's bytes as stored. Feed it with ``update``; ``hexdigest`` has 64 digits."""
    return blake3()
