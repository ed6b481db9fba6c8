"""Thin QR of a batch of tall panels by products alone (Cholesky QR), for GPUs.

A Householder QR works column by column. The Cholesky factor of the panel's Gram matrix gives the same Q and R (up to
signs) by two products and one small factorisation. It squares the condition number, so Gram matrices are made in
float64, columns are brought to length 1 first, and everything is done twice: the second pass repairs what the first
left at condition^2 times rounding ("CholeskyQR2", Yamamoto et al., ETNA 44, 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from devec.linalg.numerics import CORE

NEAR = 0.1
"""How far from the identity the Gram matrix of a once-treated panel may be; the second pass then ends at rounding.
Panels beyond it (or whose factorisation fails) are numerically rank-deficient and get a Householder QR."""


def orthonormal(Z: Tensor) -> tuple[Tensor, Tensor]:
    """``Z_i = Q_i R_i`` for each ``n x w`` matrix of a float32 batch ``(b, n, w)``.

    Q ``(b, n, min(n, w))`` float32 with orthonormal columns (also where Z_i is rank-deficient), R float64, upper
    triangular.
    """
    b, n, w = Z.shape
    if b == 0 or w == 0 or n < w:
        Q, R = torch.linalg.qr(Z)
        return Q, R.to(CORE)
    Y = Z.to(CORE)
    lengths = torch.linalg.vector_norm(Y, dim=1, keepdim=True)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    Y = Y / lengths
    eye = torch.eye(w, dtype=CORE, device=Z.device)
    good = torch.ones(b, dtype=torch.bool, device=Z.device)
    R = torch.diag_embed(lengths[:, 0])
    for second in (False, True):
        G = Y.mT @ Y
        if second:  # NaN compares false: what went wrong in the first pass is caught here
            good &= (G - eye).abs().amax(dim=(1, 2)) < NEAR
        L, failed = torch.linalg.cholesky_ex(G)
        good &= failed == 0
        # The inverse of a small triangle and a product are faster than solving against a panel.
        Y = Y @ torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False).mT
        R = L.mT @ R
    Q = Y.to(Z.dtype)
    for i in (~good).nonzero()[:, 0].tolist():
        Q[i], r = torch.linalg.qr(Z[i])
        R[i] = r.to(CORE)
    return Q, R
