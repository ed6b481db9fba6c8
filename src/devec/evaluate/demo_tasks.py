"""Seven different tasks on real pictures and measurements that scikit-learn ships. Nothing is downloaded.

Every input is a 16 x 16 grey picture, so that one encoder serves all; every task has its own labels. The sources are
1,797 handwritten digits, two photographs (427 x 640), and the measurements of 569 tumours, drawn as a bar chart.

Nothing of a test split is ever seen in training, in any task: all digit tasks split the digits alike, pairs and
backgrounds are drawn inside a split, and the photographs are cut into cells of which each belongs to one split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from devec.core.errors import InputError

Split = Literal["train", "select", "test"]
SPLITS: tuple[Split, ...] = ("train", "select", "test")
FRACTIONS = (0.5, 0.2, 0.3)
SIDE = 16
CELL = 24  # a photograph is dealt out in cells of 24 x 24 pixels; a patch never leaves its cell
STRIDE = 8

Array = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """Pictures ``x`` of shape ``(n, 16, 16)`` in float32 and labels ``y`` in ``0 .. classes - 1``, in three splits.

    ``select`` is for choosing coefficients and learning them, ``test`` for reporting and nothing else.
    """

    name: str
    about: str
    classes: int
    x_train: Tensor
    y_train: Tensor
    x_select: Tensor
    y_select: Tensor
    x_test: Tensor
    y_test: Tensor

    def split(self, name: Split) -> tuple[Tensor, Tensor]:
        if name == "train":
            return self.x_train, self.y_train
        if name == "select":
            return self.x_select, self.y_select
        if name == "test":
            return self.x_test, self.y_test
        raise ValueError(f"no split is called {name!r}; there are {', '.join(SPLITS)}")


def make_tasks(seed: int = 0) -> list[Task]:
    """The demo's tasks: ``digits, scene, turn, larger, parity, photo, tumour``. The same seed gives the same bytes.

    Raises :class:`InputError` if scikit-learn (or Pillow, for the photographs) is not installed.
    """
    digits, values, photos, measures, diagnosis = _load()
    halves = _stratified(values, _generator(seed, "digits"))
    patches, photo = _patches(photos, _generator(seed, "photo"))
    small = [digits[i] for i in halves]
    labels = [values[i] for i in halves]
    big = [np.kron(x, np.ones((1, 2, 2))) for x in small]

    rng = _generator(seed, "scene")
    scenes = [_over(x, p[rng.integers(0, len(p), len(x))]) for x, p in zip(big, patches, strict=True)]
    rng = _generator(seed, "turn")
    quarter = [rng.integers(0, 4, len(x)) for x in big]
    turned = [_map(np.rot90, x, k) for x, k in zip(big, quarter, strict=True)]
    rng = _generator(seed, "larger")
    partner = [rng.permutation(len(x)) for x in small]
    pairs = [_side_by_side(x, x[j]) for x, j in zip(small, partner, strict=True)]
    larger = [(y > y[j]).astype(np.int64) for y, j in zip(labels, partner, strict=True)]
    negatives = [1.0 - x[:, :, ::-1] for x in big]
    parts = _stratified(diagnosis, _generator(seed, "tumour"))
    charts = _bars(_ranks(measures, measures[parts[0]]))

    return [
        _task("digits", "handwritten digits: which digit", 10, big, labels),
        _task("scene", "digits painted over patches of a photograph: which digit", 10, scenes, labels),
        _task("turn", "digits turned by quarters: which way up", 4, turned, quarter),
        _task("larger", "two digits side by side: is the left one larger", 2, pairs, larger),
        _task("parity", "mirrored digits in negative: odd or even", 2, negatives, [y % 2 for y in labels]),
        _task("photo", "patches of two photographs: temple or flower", 2, patches, photo),
        _task("tumour", "bar charts of 30 measurements: benign or malignant", 2,
              [charts[i] for i in parts], [diagnosis[i] for i in parts]),
    ]  # fmt: skip


def _load() -> tuple[Array, Labels, list[Array], Array, Labels]:
    try:
        from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images

        digits, tumours = load_digits(), load_breast_cancer()
        photos = [np.asarray(p, dtype=np.float64).mean(axis=2) / 255.0 for p in load_sample_images().images]
    except ImportError as error:
        raise InputError(
            f"the demo's data come with scikit-learn, and something is missing ({error.name or error})",
            remedy="Install it: pip install 'devec[demo]'.",
        ) from None
    return (
        digits.images / 16.0,
        digits.target.astype(np.int64),
        photos,
        np.asarray(tumours.data, dtype=np.float64),
        tumours.target.astype(np.int64),
    )


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, crc32(name.encode())])


def _cut(n: int) -> tuple[int, int]:
    return round(FRACTIONS[0] * n), round((FRACTIONS[0] + FRACTIONS[1]) * n)


def _stratified(labels: Labels, rng: np.random.Generator) -> list[Labels]:
    """Indices of train, select and test: each class divided by ``FRACTIONS``."""
    parts: list[list[Labels]] = [[], [], []]
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        for part, chosen in zip(parts, np.split(members, _cut(len(members))), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(p)) for p in parts]


def _patches(photos: Sequence[Array], rng: np.random.Generator) -> tuple[list[Array], list[Labels]]:
    """Patches of the photographs, and which photograph each is from. Splits share no pixel."""
    x: list[list[Array]] = [[], [], []]
    y: list[list[int]] = [[], [], []]
    for label, photo in enumerate(photos):
        h, w = photo.shape
        corners = [(r, c) for r in range(0, h - CELL + 1, CELL) for c in range(0, w - CELL + 1, CELL)]
        order = rng.permutation(len(corners))
        offsets = range(0, CELL - SIDE + 1, STRIDE)
        for part, chosen in enumerate(np.split(order, _cut(len(order)))):
            for top, left in (corners[i] for i in chosen):
                for r, c in ((top + dr, left + dc) for dr in offsets for dc in offsets):
                    x[part].append(photo[r : r + SIDE, c : c + SIDE])
                    y[part].append(label)
    return [np.stack(p) for p in x], [np.asarray(p, dtype=np.int64) for p in y]


def _over(ink: Array, background: Array) -> Array:
    """Digits over backgrounds, in the shade that stands out: dark on bright patches, bright on dark ones."""
    shade: Array = (background.mean(axis=(1, 2)) < 0.5).astype(np.float64)[:, None, None]
    painted: Array = background * (1 - 0.8 * ink) + shade * 0.8 * ink
    return painted


def _side_by_side(left: Array, right: Array) -> Array:
    canvas = np.zeros((len(left), SIDE, SIDE))
    canvas[:, 4:12, :8], canvas[:, 4:12, 8:] = left, right
    return canvas


def _ranks(values: Array, reference: Array) -> Array:
    """Each feature as the fraction of ``reference`` below it: 0 to 1, whatever its unit."""
    columns = [np.searchsorted(np.sort(r), v) / len(r) for v, r in zip(values.T, reference.T, strict=True)]
    return np.stack(columns, axis=1)


def _bars(heights: Array) -> Array:
    """Bar charts: two rows of 15 bars, one pixel wide and up to 8 high; a bar's top pixel is grey by the remainder."""
    canvas = np.zeros((len(heights), SIDE, SIDE))
    for j in range(heights.shape[1]):
        row, column = divmod(j, 15)
        for level in range(8):
            canvas[:, row * 8 + 7 - level, column] = np.clip(8 * heights[:, j] - level, 0, 1)
    return canvas


def _map(f: Callable[..., Array], pictures: Array, arguments: Labels) -> Array:
    return np.stack([f(p, int(a)) for p, a in zip(pictures, arguments, strict=True)])


def _task(name: str, about: str, classes: int, x: Sequence[Array], y: Sequence[Labels]) -> Task:
    """Standardise by the training pictures' mean and deviation (one number each)."""
    mean, deviation = float(x[0].mean()), float(x[0].std())
    pictures = [torch.from_numpy(np.ascontiguousarray((part - mean) / deviation)).float() for part in x]
    labels = [torch.from_numpy(np.ascontiguousarray(part)).long() for part in y]
    return Task(name, about, classes, pictures[0], labels[0], pictures[1], labels[1], pictures[2], labels[2])
