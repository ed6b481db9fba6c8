"""Controls: what a decomposition's shared vectors are held against.

A gain from extra vectors proves nothing about sharing: any extra direction is one more number to tune. The fair
control has the same rank and norm per tensor, lies in the vectors' own column spaces, and knows nothing of overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from devec.core.decomposition import Decomposition
from devec.core.delta import Delta, DenseDelta
from devec.core.errors import UsageError
from devec.core.vectors import LazyMap, TaskVector
from devec.linalg.numerics import generator


def random_shared(d: Decomposition, pair: Sequence[str], draw: int) -> TaskVector:
    """A stand-in for ``#shared:A+B`` built on random directions instead of shared ones.

    Per tensor, with q directions shared by the pair: Z = U_i R, R a random orthonormal ``(r_i, q)``, U_i the basis of
    A or B in turn; then Eq. (14) of arXiv:2512.22511 with this Z, scaled to the Frobenius norm of the true shared
    vector. Side left only. Deterministic in (seed, tensor, pair, draw).
    """
    if d.factoring.side != "left":
        raise UsageError("random controls are defined for side left")
    true = d.shared(*pair)
    i, j = sorted((d.index(pair[0]), d.index(pair[1])))

    def make(name: str) -> Delta:
        wanted = true.deltas[name]
        q = d.spectra[name, "left", (i, j)].count
        if q == 0:
            return wanted
        own = d.tensors[name].svd[(i, j)[draw % 2]].U
        gen = generator("control", d.factoring.seed, name, i, j, draw)
        R = torch.linalg.qr(torch.randn(own.shape[1], q, generator=gen, dtype=torch.float64)).Q
        Z = own @ R.to(own.dtype)
        inside = [Z @ (Z.T @ d.pool[k].deltas[name].dense()) for k in (i, j)]
        weights = [float(torch.linalg.vector_norm(x)) for x in inside]
        total: Tensor = sum(w * x for w, x in zip(weights, inside, strict=True)) / max(sum(weights), 1e-30)
        norm = float(torch.linalg.vector_norm(total))
        return DenseDelta(total * (wanted.norm() / norm if norm > 0 else 0.0))

    return replace(true, name=f"random-{'+'.join(pair)}-{draw}", deltas=LazyMap(true.names(), make))
