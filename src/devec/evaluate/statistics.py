"""What a fine-tuned network says of its weights on rows of its task: diagonal Fisher, second moments of inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from devec.core.errors import IncompatibleError, InputError
from devec.evaluate.data import Rows
from devec.evaluate.network import Network, only
from devec.evaluate.scoring import Task
from devec.linalg.numerics import generator, one_blas_thread

EXACT_CLASSES = 16
"""Up to so many classes the expectation over labels is a sum; above, one label is drawn a row."""

Report = Callable[[int, int, str], None]


def sample(task: Task, examples: int, seed: int) -> Rows:
    """So many rows of the selection split (all, if there are fewer), without repeats, drawn by the seed."""
    rows = task.data.split("select")
    if examples >= len(rows):
        return rows
    index = torch.randperm(len(rows), generator=generator("statistics", seed, task.name))[:examples].sort().values
    return Rows(rows.x[index], rows.y[index], f"{examples} of {rows.words}")


def fisher(
    network: Network, task: Task, rows: Rows, names: Collection[str], seed: int, report: Report
) -> dict[str, Tensor]:
    """``F = mean_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2`` of the parameters named, in stored shapes, float32.

    The expectation is exact for up to ``EXACT_CLASSES`` classes, else of one seeded label a row (arXiv:2111.09832,
    section 3.2). Labels of the data are not looked at. One row at a time: a mean over rows before the square would be
    another number. Raises InputError if it is not finite.
    """
    only(network, names)
    parameters = {n: t for n, t in network.tensors.items() if n in names and t.requires_grad}
    own = list(parameters.values())
    found = {n: torch.zeros(p.shape, dtype=torch.float32) for n, p in parameters.items()}
    draw = generator("labels", seed, task.name)
    with one_blas_thread():
        for i in range(len(rows)):
            log_p = F.log_softmax(task.logits(network, rows.x[i : i + 1])[0].float(), dim=0)
            if not log_p.requires_grad:
                raise IncompatibleError(f"the logits of task {task.name} depend on no tensor that is merged")
            p = log_p.detach().exp()
            if len(p) <= EXACT_CLASSES:
                terms = [(y, float(p[y])) for y in range(len(p))]
            else:
                terms = [(int(torch.multinomial(p, 1, generator=draw)), 1.0)]
            for k, (y, share) in enumerate(terms):
                more = k + 1 < len(terms)
                gradients = torch.autograd.grad(log_p[y], own, retain_graph=more, allow_unused=True)
                for total, g in zip(found.values(), gradients, strict=True):
                    if g is not None:
                        total.addcmul_(g.float(), g.float(), value=share / len(rows))
            report(i + 1, len(rows), task.name)
    _check(found, task)
    return found


def moments(
    network: Network, task: Task, rows: Rows, wanted: Collection[str], report: Report
) -> dict[str, Tensor]:
    """``G = X^T X / N`` of the inputs ``X (N, m)`` of the linear layers that the rows go through, by the name of the
    weight (of those wanted); float32, summed in float64.

    Linear layers, Conv1D of transformers, and convolutions without groups, whose inputs are patches ``(in k k)``. N
    counts tokens (patches) of all rows, padding too. A layer whose weight is used without calling the layer (fused
    attention) is not seen. Raises InputError if a moment is not finite.
    """
    names = {id(t): n for n, t in network.tensors.items() if n in wanted}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            X = _inputs_of(module, inputs[0]).double()
            if name not in sums:
                sums[name], counts[name] = X.new_zeros(X.shape[1], X.shape[1]), 0
            sums[name].addmm_(X.T, X)
            counts[name] += len(X)

        return hook

    hooks: list[RemovableHandle] = [
        module.register_forward_pre_hook(seen(names[id(module.weight)]))
        for module in network.module.modules() if is_linear(module) and id(module.weight) in names
    ]
    try:
        with one_blas_thread(), torch.no_grad():
            for start in range(0, len(rows), task.batch):
                task.logits(network, rows.x[start : start + task.batch])
                report(min(start + task.batch, len(rows)), len(rows), task.name)
    finally:
        for hook in hooks:
            hook.remove()
    found = {n: (total / counts[n]).float() for n, total in sums.items() if counts[n]}
    _check(found, task)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether :func:`moments` can say what the module's inputs are."""
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    plain = plain and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or plain or type(module).__name__ == "Conv1D"


def stored_in_by_out(network: Network) -> set[str]:
    """Weights of Conv1D, which lie ``in x out``."""
    own = {id(m.weight) for m in network.module.modules() if type(m).__name__ == "Conv1D"}
    return {n for n, t in network.tensors.items() if id(t) in own}


def _inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """``(N, m)``: what the matrix ``out x m`` of the module is multiplied with."""
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(
            x, module.kernel_size, module.dilation, module.padding, module.stride,  # type: ignore[arg-type]
        )
        return patches.transpose(1, 2).reshape(-1, prod(module.weight.shape[1:]))
    return x.reshape(-1, x.shape[-1])


def _check(found: dict[str, Tensor], task: Task) -> None:
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"the statistics of task {task.name} are not finite", tensor=name,
                remedy="Do the model's own outputs on these rows overflow?",
            )
