"""How weights become a network: one of transformers by its configuration, or a function of the user's own.

A :class:`Network` is a module whose tensors are known by their names in the checkpoint, so that a merge can be written
into it in place. It is always in evaluation mode (no dropout, running statistics of BatchNorm as stored).
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from devec.core.contracts import TensorSource
from devec.core.errors import DevecError, IncompatibleError, InputError, UsageError

Kind = Literal["image-classification", "sequence-classification", "clip-image"]
KINDS: dict[str, str] = {
    "image-classification": "AutoModelForImageClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "clip-image": "CLIPVisionModelWithProjection",
}
_OUTPUTS = ("logits", "image_embeds", "pooler_output")


@dataclass
class Network:
    """``module`` and its ``tensors``: name in the checkpoint -> parameter or buffer of the module.

    ``image`` is (channels, side) where the configuration says what a picture must be.
    """

    module: nn.Module
    tensors: dict[str, Tensor]
    image: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.module.eval()
        self.takes_task = "task" in inspect.signature(self.module.forward).parameters

    def __call__(self, x: Tensor, task: str) -> Tensor:
        """Logits or features ``(rows, width)``. ``x`` are floats (pictures) or int64 token ids (0 is padding)."""
        try:
            if x.dtype == torch.int64:
                out = self.module(input_ids=x, attention_mask=(x != 0).long())
            else:
                out = self.module(x, task) if self.takes_task else self.module(x)
        except DevecError:
            raise
        except Exception as error:
            raise IncompatibleError(
                f"the network failed on rows of task {task}: {type(error).__name__}: {error}",
                values={"rows": tuple(x.shape)}, remedy="Do size and channels in the suite fit the network?",
            ) from error
        return _tensor_of(out, task)

    def load(self, source: TensorSource) -> None:
        """Write every tensor of ``source`` that the network has. Raises IncompatibleError for another shape."""
        with torch.no_grad():
            for name, own in self.tensors.items():
                value = source.get(name)
                if value.shape != own.shape:
                    raise IncompatibleError(
                        "a tensor has another shape in the network", tensor=name,
                        values={"network": tuple(own.shape), "weights": tuple(value.shape)}, file=source.file_of(name),
                    )
                own.copy_(value)


def _tensor_of(out: Any, task: str) -> Tensor:
    if not isinstance(out, Tensor):
        out = next((found for key in _OUTPUTS if (found := getattr(out, key, None)) is not None), out)
    if not isinstance(out, Tensor) or out.ndim != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise IncompatibleError(
            f"the network gives no matrix of rows x classes for task {task}", values={"output": shape}
        )
    return out


def from_transformers(
    kind: Kind, config: Mapping[str, Any] | None, source: TensorSource, dtype: torch.dtype = torch.float32
) -> Network:
    """The network of a Hugging Face folder, by its ``config.json``, with the weights of ``source``.

    Tensors of the checkpoint that the network lacks (another tower, heads) are left out. Raises InputError without
    transformers or a configuration, IncompatibleError for a tensor that the network needs and the checkpoint lacks.
    """
    if config is None:
        raise InputError(
            "a network of transformers is built by its config.json, and the model has none", file=source.reference,
            remedy="Give a Hugging Face folder, or write model: {python: FILE:FUNCTION} in the suite.",
        )
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed", remedy="Install it: pip install 'devec[hf]'.") from None
    cls, built = _class_and_config(transformers, kind, dict(config), source)
    module, spelling = _spelt(transformers, cls, built, source)
    module.to(dtype)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    network = Network(module, {stored: own[name] for name, stored in spelling.items()}, _image_of(built))
    network.load(source)
    return network


def _class_and_config(transformers: Any, kind: Kind, config: dict[str, Any], source: TensorSource) -> tuple[Any, Any]:
    model_type = config.pop("model_type", None)
    try:
        if kind == "clip-image":
            vision = config.get("vision_config", config)
            size = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
            built = transformers.CLIPVisionConfig(**{**vision, **size})
            return transformers.CLIPVisionModelWithProjection, built
        built = transformers.AutoConfig.for_model(model_type, **config)
        return getattr(transformers, KINDS[kind])._model_mapping[type(built)], built
    except (KeyError, ValueError, TypeError) as error:
        raise IncompatibleError(
            f"transformers {transformers.__version__} has no {kind} network for this configuration",
            values={"model_type": model_type, "error": f"{type(error).__name__}: {error}"}, file=source.reference,
        ) from None


def _spelt(transformers: Any, cls: Any, config: Any, source: TensorSource) -> tuple[nn.Module, dict[str, str]]:
    """The network, and its own names -> names in the checkpoint, which versions of transformers spell differently.

    Its own loader is asked: each stored tensor is filled with its number, and where a number arrives is its place.
    """
    names = [*source.names(), *source.ties]
    marks = {n: torch.tensor(float(i)).expand(source.info(n).shape) for i, n in enumerate(names)}
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        module, info = cls.from_pretrained(
            None, config=config, state_dict=marks, dtype=torch.float32, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise IncompatibleError(
            f"transformers cannot place these weights: {error}", file=source.reference
        ) from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    spelling: dict[str, str] = {}
    for name, held in module.state_dict().items():
        number = float(held.flatten()[0]) if held.numel() else -1.0
        pure = held.numel() > 0 and bool((held == number).all()) and number.is_integer() and 0 <= number < len(names)
        if name in info["missing_keys"] or not pure:
            raise IncompatibleError(
                "the network needs a tensor that the checkpoint lacks, or holds in another arrangement", tensor=name,
                values={"network": cls.__name__}, file=source.reference,
                remedy="Give the whole model (backbone and head), or another kind of network in the suite.",
            )
        spelling[name] = names[int(number)]
    with torch.no_grad():
        for own in (*module.parameters(), *module.buffers()):
            own.data = own.data.clone(memory_format=torch.contiguous_format)  # the loader kept the expanded marks
    return module, spelling


def _image_of(config: Any) -> tuple[int, int] | None:
    side = getattr(config, "image_size", None)
    return (int(getattr(config, "num_channels", 3)), side) if isinstance(side, int) else None


def from_python(
    place: str, folder: Path, source: TensorSource, config: Mapping[str, Any] | None, dtype: torch.dtype = torch.float32
) -> Network:
    """The user's own network: ``place`` is ``FILE.py:FUNCTION`` (relative to ``folder``), and the function is given
    (state dict, config or None) and returns a module whose ``state_dict`` spells the checkpoint's names.

    ``forward(x)``, or ``forward(x, task)`` for a network with a head per task. The file is the user's own code and is
    run. Raises UsageError for a place that is no function, IncompatibleError if no tensor of the module is in the
    checkpoint.
    """
    function = _function(place, folder)
    state = {n: source.get(n) for n in (*source.names(), *source.ties)}
    try:
        module = function(state, None if config is None else dict(config))
    except DevecError:
        raise
    except Exception as error:
        raise IncompatibleError(
            f"{place} failed to build the network: {type(error).__name__}: {error}", file=source.reference
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{place} returns no torch module", values={"returned": type(module).__name__})
    module.to(dtype)
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    tensors = {n: own[n] for n in state if n in own and own[n].is_floating_point()}
    if not tensors:
        raise IncompatibleError(
            f"no tensor of the network of {place} has a name of the checkpoint",
            values={"network": next(iter(own), "none"), "checkpoint": next(iter(state), "none")},
            file=source.reference, remedy="Return a module with the checkpoint's own names.",
        )
    network = Network(module, tensors)
    network.load(source)
    return network


def _function(place: str, folder: Path) -> Any:
    file, sign, name = place.rpartition(":")
    path = folder / file
    if not sign or not path.is_file():
        raise UsageError(
            f"model: python: {place!r} is no FILE.py:FUNCTION", file=folder,
            remedy="Write the file's path, seen from the suite, a colon, and the function's name.",
        )
    spec = importlib.util.spec_from_file_location(f"devec_network_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"the network's file does not run: {type(error).__name__}: {error}", file=path) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"no function is called {name!r}", file=path)
    return found


def only(network: Network, names: Iterable[str]) -> None:
    """Gradients for these tensors and no others."""
    wanted = set(names)
    for p in network.module.parameters():
        p.requires_grad_(False)
    for name, tensor in network.tensors.items():
        if name in wanted and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
