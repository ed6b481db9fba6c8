"""The recipe of arXiv:2512.22511, Eq. (6)-(13), for two vectors, as one would type it from the page.

It imports nothing of devec: it is what devec is timed against, and a second opinion on what devec finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LiteralPair:
    """``eigenvalues`` of P_1 P_2, all n of them, real parts descending; parts of both vectors."""

    eigenvalues: Tensor
    Z: Tensor
    shared: tuple[Tensor, Tensor]
    unique: tuple[Tensor, Tensor]


def literal_pair(W1: Tensor, W2: Tensor, rank: int, threshold: float = 0.85) -> LiteralPair:
    """Shared and unique parts of two ``n x m`` matrices through n x n projectors.

    The one liberty is ``rank``: the paper keeps every column of U, which makes P_i the identity as soon as W_i has
    full rank, and everything shared. Cut at the rank that devec keeps, both answer the same question, and the
    literal side's ``eig`` has the easier problem (most eigenvalues are zero).
    """
    U1 = torch.linalg.svd(W1, full_matrices=False)[0][:, :rank]  # Eq. (6)
    U2 = torch.linalg.svd(W2, full_matrices=False)[0][:, :rank]
    P1 = U1 @ U1.T  # Eq. (7)
    P2 = U2 @ U2.T
    eigenvalues, vectors = torch.linalg.eig(P1 @ P2)  # Eq. (8), (9)
    order = torch.argsort(eigenvalues.real, descending=True)
    eigenvalues, vectors = eigenvalues.real[order], vectors.real[:, order]
    Z = vectors[:, eigenvalues > threshold]  # Eq. (10)
    P = Z @ Z.T  # Eq. (11)
    shared1, shared2 = P @ W1, P @ W2  # Eq. (12)
    return LiteralPair(eigenvalues, Z, (shared1, shared2), (W1 - shared1, W2 - shared2))  # Eq. (13)
