"""Inner products of all pairs of k matrices at once, in float64: one product in place of k^2 small ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from devec.linalg.numerics import CORE


def inner_products_of_dense(matrices: Sequence[Tensor], block: int = 1 << 20) -> Tensor:
    """``<W_i, W_j>``, ``(k, k)`` float64, on the matrices' device. The float64 copy is never larger than k x block."""
    flat = [W.reshape(-1) for W in matrices]
    G = torch.zeros(len(flat), len(flat), dtype=CORE, device=flat[0].device)
    for i in range(0, flat[0].numel(), block):
        part = torch.stack([x[i : i + block] for x in flat]).to(CORE)
        G.addmm_(part, part.T)
    return G


def inner_products_of_factors(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``<B_i A_i, B_j A_j> = sum (B_i^T B_j) * (A_i A_j^T)`` without any product B A; ranks may differ."""
    B = torch.cat([B for B, _ in factors], dim=1).to(CORE)
    A = torch.cat([A for _, A in factors], dim=0).to(CORE)
    ranks = torch.tensor([B.shape[1] for B, _ in factors], device=B.device)
    owner = torch.repeat_interleave(torch.arange(len(factors), device=B.device), ranks)
    sums = torch.nn.functional.one_hot(owner, len(factors)).to(CORE)
    return sums.T @ ((B.T @ B) * (A @ A.T)) @ sums
