"""devec: split fine-tunes and adapters into shared and unique parts, and recombine them.

Nouns first, then verbs. Importing this module imports neither torch nor anything else that is slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    # nouns
    "Checkpoint": "devec.io.checkpoint",
    "Coefficients": "devec.core.coefficients",
    "Decomposition": "devec.core.decomposition",
    "DenseDelta": "devec.core.delta",
    "Edited": "devec.api.edit",
    "Factoring": "devec.core.options",
    "LowRankDelta": "devec.core.delta",
    "Pool": "devec.core.vectors",
    "Selection": "devec.io.names",
    "SparseDelta": "devec.core.delta",
    "Subspace": "devec.core.results",
    "TaskVector": "devec.core.vectors",
    "View": "devec.core.options",
    # verbs
    "analogy": "devec.core.vectors",
    "apply": "devec.api.apply",
    "collect": "devec.api.collect",
    "compare": "devec.api.inspect",
    "decompose": "devec.api.decompose",
    "eval": "devec.api.eval",
    "export": "devec.api.export",
    "extract": "devec.api.extract",
    "inspect": "devec.api.inspect",
    "learn": "devec.api.learn",
    "load": "devec.api.references",
    "load_decomposition": "devec.api.references",
    "merge": "devec.api.merge",
    "mix": "devec.api.mix",
    "negate": "devec.api.negate",
    "open_model": "devec.api.references",
    "read_coefficients": "devec.api.coefficients",
    "read_statistics": "devec.api.statistics",
    "register": "devec.methods.registry",
    "save": "devec.api.save",
    "save_coefficients": "devec.api.coefficients",
    "save_decomposition": "devec.api.decompose",
    "verify": "devec.io.verify",
}
_OWN_NAME = {"eval": "evaluate", "load": "load_vector", "verify": "verify_output"}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from devec.api.apply import apply as apply
    from devec.api.coefficients import read_coefficients as read_coefficients
    from devec.api.coefficients import save_coefficients as save_coefficients
    from devec.api.collect import collect as collect
    from devec.api.decompose import decompose as decompose
    from devec.api.decompose import save_decomposition as save_decomposition
    from devec.api.edit import Edited as Edited
    from devec.api.eval import evaluate as eval  # noqa: F401
    from devec.api.export import export as export
    from devec.api.extract import extract as extract
    from devec.api.inspect import compare as compare
    from devec.api.inspect import inspect as inspect
    from devec.api.learn import learn as learn
    from devec.api.merge import merge as merge
    from devec.api.mix import mix as mix
    from devec.api.negate import negate as negate
    from devec.api.references import load_decomposition as load_decomposition
    from devec.api.references import load_vector as load  # noqa: F401
    from devec.api.references import open_model as open_model
    from devec.api.save import save as save
    from devec.api.statistics import read_statistics as read_statistics
    from devec.core.coefficients import Coefficients as Coefficients
    from devec.core.decomposition import Decomposition as Decomposition
    from devec.core.delta import DenseDelta as DenseDelta
    from devec.core.delta import LowRankDelta as LowRankDelta
    from devec.core.delta import SparseDelta as SparseDelta
    from devec.core.options import Factoring as Factoring
    from devec.core.options import View as View
    from devec.core.results import Subspace as Subspace
    from devec.core.vectors import Pool as Pool
    from devec.core.vectors import TaskVector as TaskVector
    from devec.core.vectors import analogy as analogy
    from devec.io.checkpoint import Checkpoint as Checkpoint
    from devec.io.names import Selection as Selection
    from devec.io.verify import verify_output as verify  # noqa: F401
    from devec.methods.registry import register as register


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'devec' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), _OWN_NAME.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
