"""Merge recipes: strict YAML with a suggestion for every misspelt key."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from devec.core.errors import InputError, UsageError

DTYPES = ("float32", "float64", "bfloat16", "float16")


class ViewRecipe(BaseModel):
    """Read-time choices for sources that are parts of a decomposition."""

    model_config = ConfigDict(extra="forbid")
    threshold: float | Literal["chance"] | None = None
    fdr: float | None = None
    pair_basis: Literal["bisector", "first", "own"] | None = None
    joint: Literal["consensus", "chain"] | None = None
    target_rule: Literal["union", "sequence"] | None = None
    angles: bool | None = None
    paper: bool | None = None


class Recipe(BaseModel):
    """What ``devec merge RECIPE.yaml`` reads. Paths are relative to the working folder, as on the command line."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    method: str
    base: str | None = None
    sources: list[str]
    parameters: dict[str, Any] = {}
    include: list[str] = []
    exclude: list[str] = []
    view: ViewRecipe = ViewRecipe()
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    heads_from: str | None = None
    dtype: Literal["float32", "float64"] = "float32"
    out_dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    seed: int = 0
    suite: str | None = None
    coefficients: str | None = None


def read_recipe(path: str | Path) -> Recipe:
    """Parse a recipe. Raises InputError if it cannot be read, UsageError (naming key and remedy) if it is wrong."""
    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe: {error.strerror}", file=file) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe is not YAML: {' '.join(str(error).split())}", file=file) from None
    if not isinstance(data, dict):
        raise UsageError("a recipe is a mapping with method and sources", file=file)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explained(error, file) from None


def _explained(error: ValidationError, file: Path) -> UsageError:
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"])
    known = list(ViewRecipe.model_fields if first["loc"][0] == "view" else Recipe.model_fields)
    if first["type"] == "extra_forbidden":
        near = get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
        return UsageError(f"the recipe has an unknown key {where!r}", file=file, remedy=remedy)
    if first["type"] == "missing":
        return UsageError(f"the recipe lacks {where!r}", file=file)
    values = {"found": first["input"]}
    return UsageError(f"the recipe's {where!r} does not fit: {first['msg']}", values=values, file=file)
