"""Elementwise merges in plain float64 numpy, one entry or one row at a time; imports nothing of devec.

A model is a mapping from tensor name to its change (a float64 array, any shape); a merge gives such a mapping back.
Rows are those of the first dimension, a 1-D tensor is one row.
"""

from __future__ import annotations

import hashlib
from math import acos, exp, sin, tanh

import numpy as np

Model = dict[str, np.ndarray]
M64 = (1 << 64) - 1


def flat(model: Model) -> np.ndarray:
    return np.concatenate([model[n].reshape(-1) for n in model])


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(1, -1) if x.ndim <= 1 else x.reshape(x.shape[0], -1)


def sign(x: float) -> int:
    return int(x > 0) - int(x < 0)


# --- TIES ------------------------------------------------------------------------------------------------------------


def kth_largest(values: np.ndarray, density: float) -> float:
    ordered = sorted((abs(float(v)) for v in values.reshape(-1)), reverse=True)
    return ordered[max(int(density * len(ordered)), 1) - 1] if ordered else 0.0


def ties(
    models: list[Model], density: float = 0.2, scale: float = 1.0, weights: list[float] | None = None,
    scope: str = "tensor", reduce: str = "mean", elect: str = "sum", zero: str = "majority",
) -> Model:  # fmt: skip
    w = weights or [1.0] * len(models)
    groups = [list(models[0])] if scope == "model" else [[n] for n in models[0]]
    out: Model = {}
    for names in groups:
        part = [{n: m[n] for n in names} for m in models]
        cuts = [kth_largest(flat(m), density) for m in part]
        kept = {
            n: [[wi * v if abs(v) >= cut else 0.0 for v in m[n].reshape(-1)]
                for m, cut, wi in zip(part, cuts, w, strict=True)] for n in names
        }  # fmt: skip
        signs = {
            n: [sign(sum(sign(v) if elect == "count" else v for v in place)) for place in zip(*kept[n], strict=True)]
            for n in names
        }
        majority = sign(sum(s for n in names for s in signs[n]))
        default = {"majority": majority, "plus": 1, "none": 0}[zero]
        for n in names:
            merged = []
            for place, g in zip(zip(*kept[n], strict=True), signs[n], strict=True):
                chosen = [(v, abs(wi)) for v, wi in zip(place, w, strict=True) if v * (g or default) > 0]
                value = sum(v for v, _ in chosen)
                if reduce == "mean" and chosen:
                    value /= sum(wi for _, wi in chosen)
                merged.append(scale * value)
            out[n] = np.array(merged).reshape(models[0][n].shape)
    return out


def mean_of_the_elected(stack: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Of weighted changes: the mean of those that have the sign of their sum, 0 where the sum is 0."""
    out = np.zeros(stack[0].size)
    for i, place in enumerate(zip(*(x.reshape(-1) for x in stack), strict=True)):
        g = sign(sum(place))
        chosen = [(v, abs(w)) for v, w in zip(place, weights, strict=True) if v * g > 0]
        out[i] = sum(v for v, _ in chosen) / sum(w for _, w in chosen) if chosen else 0.0
    return out.reshape(stack[0].shape)


# --- random drops ----------------------------------------------------------------------------------------------------


def draw(seed: int, tensor: str, vector: str, row: int, column: int) -> float:
    """SplitMix64's finaliser of the place and a key, in whole numbers."""
    key = int.from_bytes(hashlib.sha256(repr(("mask", seed, tensor, vector)).encode()).digest()[:8], "little")
    z = (((row << 32) + column) * 0x9E3779B97F4A7C15 + key) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return ((z ^ (z >> 31)) >> 11) / 2.0**53


def draws(seed: int, tensor: str, vector: str, shape: tuple[int, ...]) -> np.ndarray:
    """Of a matrix ``out x in``, or of a 1-D tensor, which is a column."""
    n, m = (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else (int(np.prod(shape)), 1)
    return np.array([[draw(seed, tensor, vector, i, j) for j in range(m)] for i in range(n)]).reshape(shape)


def dropped(
    models: list[Model], names: list[str], chances: list[Model], rescale: str, seed: int, then: str, scale: float,
    weights: list[float] | None,
) -> Model:  # fmt: skip
    w = weights or [1.0] * len(models)
    out: Model = {}
    for n in models[0]:
        stack = []
        for model, name, chance, wi in zip(models, names, chances, w, strict=True):
            x = model[n]
            mask = draws(seed, n, name, x.shape) < chance[n]
            if rescale == "inverse":
                left = np.where(mask, x / chance[n], 0.0)
            else:
                left = np.where(mask, x, 0.0)
                size = np.abs(left).sum()
                left = left * (np.abs(x).sum() / size) if size > 0 else left
            stack.append(wi * left)
        out[n] = scale * (sum(stack) if then == "task-arithmetic" else mean_of_the_elected(stack, w))
    return out


def della_chances(x: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    matrix = rows(x)
    out = np.empty(matrix.shape)
    for i, row in enumerate(matrix):
        order = sorted(range(len(row)), key=lambda j, row=row: (abs(row[j]), j))
        for rank, j in enumerate(order):
            step = 2 * epsilon * rank / (len(row) - 1) if len(row) > 1 else epsilon
            out[i, j] = density - epsilon + step
    return out.reshape(x.shape)


# --- the others ------------------------------------------------------------------------------------------------------


def breadcrumbs(
    models: list[Model], beta: float, gamma: float, scale: float, weights: list[float] | None = None,
    scope: str = "row",
) -> Model:  # fmt: skip
    w = weights or [1.0] * len(models)
    out: Model = {}
    for n, first in models[0].items():
        total = np.zeros(first.shape)
        for model, wi in zip(models, w, strict=True):
            matrix = rows(model[n]) if scope == "row" else model[n].reshape(1, -1)
            kept = np.zeros(matrix.shape)
            for i, row in enumerate(matrix):
                falling = sorted((abs(v) for v in row), reverse=True)
                g = int(gamma * len(row))
                k = min(max(int(beta * len(row)), 1), len(row) - g)
                allowed = set(falling[g : g + k])
                kept[i] = [v if abs(v) in allowed else 0.0 for v in row]
            total += wi * kept.reshape(first.shape)
        out[n] = scale * total
    return out


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    size = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    c = (a * b).sum() / size if size > 0 else 1.0
    if abs(c) > 0.9995:
        return (1 - t) * a + t * b
    phi = acos(c)
    return (sin((1 - t) * phi) * a + sin(t * phi) * b) / sin(phi)


def model_stock(changes: list[np.ndarray]) -> np.ndarray:
    N, cosines = len(changes), []
    for i in range(N):
        for j in range(i):
            size = np.sqrt((changes[i] ** 2).sum() * (changes[j] ** 2).sum())
            cosines.append((changes[i] * changes[j]).sum() / size if size > 0 else 0.0)
    c = max(sum(cosines) / len(cosines), 0.0)
    return N * c / (1 + (N - 1) * c) * sum(changes) / N


def pcb(models: list[Model], ratio: float, scale: float, scope: str = "model") -> Model:
    out: Model = {}
    for names in [list(models[0])] if scope == "model" else [[n] for n in models[0]]:
        x = np.stack([flat({n: m[n] for n in names}) for m in models])
        T, d = x.shape
        total, D, share = x.sum(0), np.empty(x.shape), np.empty(x.shape)
        for i in range(T):
            size = np.sort(np.abs(x[i]))
            low = size[min(max(int(d * 0.0001), 0), d - 1)]
            high = size[min(max(int(d * (1 - 0.0001) - 1), 0), d - 1)]
            a = np.clip(np.abs(x[i]), low, high)
            D[i] = np.sign(x[i]) * a
            b = ((a - low) / (high - low)) ** 2 if high > low else np.zeros(d)
            score = np.array([exp(T * bj) * tanh(v * s) for bj, v, s in zip(b, x[i], total, strict=True)])
            cut = np.sort(score)[min(max(int(d * (1 - ratio)), 0), d - 1)]
            top = score.max()
            share[i] = (np.maximum(score, cut) - cut) / (top - cut) if top > cut else 0.0
        whole = share.sum(0)
        merged = scale * np.where(whole > 0, (share * D).sum(0) / np.where(whole > 0, whole, 1.0), 0.0)
        at = 0
        for n in names:
            out[n] = merged[at : at + models[0][n].size].reshape(models[0][n].shape)
            at += models[0][n].size
    return out


def tall_mask(change: np.ndarray, total: np.ndarray, threshold: float) -> np.ndarray:
    return np.abs(change) > threshold * np.abs(total - change)


def consensus(models: list[Model], scale: float, agree: int, thresholds: list[float]) -> Model:
    out: Model = {}
    for n in models[0]:
        total = sum(m[n] for m in models)
        votes = sum(tall_mask(m[n], total, t).astype(int) for m, t in zip(models, thresholds, strict=True))
        out[n] = scale * np.where(votes >= agree, total, 0.0)
    return out


def tall_masks(models: list[Model], task: int, threshold: float) -> Model:
    total = {n: sum(m[n] for m in models) for n in models[0]}
    return {n: np.where(tall_mask(models[task][n], total[n], threshold), total[n], 0.0) for n in total}


def emr(models: list[Model], task: int) -> Model:
    shared: Model = {}
    for n, first in models[0].items():
        values = []
        for place in zip(*(m[n].reshape(-1) for m in models), strict=True):
            g = sign(sum(place))
            values.append(g * max([abs(v) for v in place if v * g > 0], default=0.0))
        shared[n] = np.array(values).reshape(first.shape)
    masked = {n: np.where(models[task][n] * shared[n] > 0, shared[n], 0.0) for n in shared}
    own = sum(np.abs(models[task][n]).mean() for n in shared if shared[n].size)
    size = sum(np.abs(masked[n]).mean() for n in shared if shared[n].size)
    return {n: masked[n] * (own / size if size > 0 else 0.0) for n in shared}
