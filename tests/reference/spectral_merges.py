"""Float64 transcriptions of spectral merge methods, as slow as they are plain: full SVDs, every product formed.

Imports nothing of devec. Where a paper's code is arbitrary on rank-deficient matrices, ``rtol`` says which directions
count; with ``rtol=0`` a function is the published algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def svd(W: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """``U, s, V^T`` of the directions above ``rtol * s_1``."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    keep = s > rtol * s[0]
    return U[:, keep], s[keep], Vh[keep]


def nearest_orthonormal(X: Tensor, rtol: float) -> Tensor:
    """``P Q^T`` of ``X = P D Q^T``."""
    P, _, Qh = svd(X, rtol)
    return P @ Qh


def tsv_merge(deltas: list[Tensor], scale: float = 1.0, rtol: float = 0.0) -> Tensor:
    """arXiv:2412.00081, algorithm of TSV-Merge."""
    k = min(deltas[0].shape) // len(deltas)
    parts = [svd(D, rtol) for D in deltas if float(D.abs().max()) > 0]
    U = torch.cat([U[:, :k] for U, _, _ in parts], dim=1)
    S = torch.cat([s[:k] for _, s, _ in parts])
    Vh = torch.cat([Vh[:k] for _, _, Vh in parts], dim=0)
    return scale * nearest_orthonormal(U, rtol) @ torch.diag(S) @ nearest_orthonormal(Vh, rtol)


def truncated(W: Tensor, k: int) -> Tensor:
    """The nearest matrix of rank k."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :k] @ torch.diag(s[:k]) @ Vh[:k]


def isotropic(deltas: list[Tensor], scale: float = 1.0, rtol: float = 0.0) -> Tensor:
    """arXiv:2502.04959, Iso-C."""
    U, s, Vh = svd(sum(D.double() for D in deltas), rtol)
    return scale * U @ torch.diag(torch.full_like(s, float(s.mean()))) @ Vh


def isotropic_common_and_task(
    deltas: list[Tensor], scale: float = 1.0, fraction: float = 0.8, rtol: float = 0.0
) -> Tensor:
    """arXiv:2502.04959, Iso-CTS."""
    U, s, Vh = svd(sum(D.double() for D in deltas), rtol)
    r = len(s)
    per_task = min(round((r - int(r * fraction)) / len(deltas)), r // len(deltas))
    common = r - per_task * len(deltas)
    left, values, right = [U[:, :common]], [s[:common]], [Vh[:common]]
    for D in deltas:
        without = D.double() - left[0] @ left[0].T @ D.double()
        u, t, vh = torch.linalg.svd(without, full_matrices=False)
        n = min(per_task, int((t > rtol * D.double().norm()).sum()))
        left.append(u[:, :n])
        values.append(t[:n])
        right.append(vh[:n])
    mean = torch.cat(values).mean()
    return scale * mean * nearest_orthonormal(torch.cat(left, 1), rtol) @ nearest_orthonormal(torch.cat(right), rtol)


def star(deltas: list[Tensor], eta: float, rtol: float = 0.0) -> Tensor:
    """arXiv:2502.10339: truncate to a part of the nuclear norm, rescale to all of it, average."""
    out = []
    for D in deltas:
        U, s, Vh = svd(D, rtol)
        r = 1
        while float(s[:r].sum()) < eta * float(s.sum()):
            r += 1
        out.append(U[:, :r] @ torch.diag(s[:r] * s.sum() / s[:r].sum()) @ Vh[:r])
    return sum(out) / len(out)  # type: ignore[return-value]


def wudi_loss(M: Tensor, deltas: list[Tensor]) -> Tensor:
    """arXiv:2503.08099: interference, each task's share divided by its squared norm."""
    total = torch.zeros((), dtype=torch.float64)
    for D in (D.double() for D in deltas):
        total = total + (((M - D) @ D.T) ** 2).sum() / (D**2).sum()
    return total


def wudi_adam(deltas: list[Tensor], steps: int = 300, rate: float = 1e-5) -> Tensor:
    """As published: torch's Adam on the loss, from the sum of the deltas."""
    M = torch.nn.Parameter(sum(D.double() for D in deltas))  # type: ignore[arg-type]
    adam = torch.optim.Adam([M], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        wudi_loss(M, deltas).backward()
        adam.step()
    return M.detach()


def wudi_ridge(deltas: list[Tensor], ridge: float) -> Tensor:
    """The minimiser of ``loss(M) + weight |M - sum|^2``, from its normal equations, ``m x m`` whatever the shape."""
    m = deltas[0].shape[1]
    forms = [D.double().T @ D.double() / (D.double() ** 2).sum() for D in deltas]
    S, start = sum(forms), sum(D.double() for D in deltas)
    weight = ridge * (S**2).sum() / torch.trace(S)  # type: ignore[operator, arg-type]
    right = sum(D.double() @ G for D, G in zip(deltas, forms, strict=True)) + weight * start
    return torch.linalg.solve(S + weight * torch.eye(m, dtype=torch.float64), right.T).T  # type: ignore[union-attr]


def knots(deltas: list[Tensor], density: float, scale: float, rtol: float) -> Tensor:
    """arXiv:2410.19735 with TIES: concatenate along inputs, one SVD, trim, elect, disjoint mean, multiply back."""
    U, s, Vh = svd(torch.cat([D.double() for D in deltas], dim=1), rtol)
    m = deltas[0].shape[1]
    tasks = [torch.diag(s) @ Vh[:, i * m : (i + 1) * m] for i in range(len(deltas))]
    trimmed = []
    for C in tasks:
        keep = max(int(density * C.numel()), 1)
        limit = C.abs().flatten().sort(descending=True).values[keep - 1]
        trimmed.append(torch.where(C.abs() >= limit, C, 0.0))
    merged = torch.zeros_like(trimmed[0])
    for i in range(merged.shape[0]):
        for j in range(merged.shape[1]):
            entries = [float(C[i, j]) for C in trimmed]
            elected = [x for x in entries if x * sum(entries) > 0]
            merged[i, j] = sum(elected) / len(elected) if elected else 0.0
    return scale * U @ merged
