"""Merge recipes: strict YAML with a suggestion for every misspelt key."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from devec.api import mergekit
from devec.api.settings import of_sources
from devec.core.errors import InputError, UsageError
from devec.core.results import Finding
from devec.methods import registry

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


class SourceRecipe(BaseModel):
    """A source with parameters of its own, of those that take a value per source (``weight``, ``density``)."""

    model_config = ConfigDict(extra="forbid")
    model: str
    parameters: dict[str, Any] = {}


class Recipe(BaseModel):
    """What ``devec merge RECIPE.yaml`` reads. Paths are relative to the working folder, as on the command line."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    method: str
    base: str | None = None
    sources: list[str | SourceRecipe]
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
    _notes: tuple[Finding, ...] = ()
    _chat_template: str | None = None

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is worth saying of the file that was read."""
        return self._notes

    @property
    def chat_template(self) -> str | None:
        """The chat template that a file of mergekit asks for."""
        return self._chat_template

    @property
    def references(self) -> list[str]:
        return [source if isinstance(source, str) else source.model for source in self.sources]

    def settings(self) -> dict[str, Any]:
        """The method's parameters with those of single sources put in. Raises UsageError for one that cannot be."""
        own = [{} if isinstance(source, str) else source.parameters for source in self.sources]
        if not any(own):
            return dict(self.parameters)
        return of_sources(registry.get("merge", self.method), self.parameters, own)


def read_recipe(path: str | Path) -> Recipe:
    """Parse a recipe, or a file of mergekit (known by its key ``merge_method``).

    Raises InputError if it cannot be read, UsageError (naming key and remedy) if it is wrong.
    """
    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe: {error.strerror}", file=file) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe is not YAML: {' '.join(str(error).split())}", file=file) from None
    if not isinstance(data, dict):
        raise UsageError("a recipe is a mapping with method and sources", file=file)
    if mergekit.is_mergekit(data):
        return _from_mergekit(mergekit.read(data, file))
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explained(error, file) from None


def _from_mergekit(plan: mergekit.Plan) -> Recipe:
    recipe = Recipe.model_validate({
        "method": plan.method, "base": plan.base, "sources": list(plan.sources), "parameters": dict(plan.parameters),
        "dtype": plan.dtype, "out_dtype": plan.out_dtype,
    })  # fmt: skip
    recipe._notes, recipe._chat_template = plan.notes, plan.chat_template
    return recipe


def _explained(error: ValidationError, file: Path) -> UsageError:
    found = [e for e in error.errors() if e["type"] != "string_type" or not isinstance(e["input"], dict)]
    first = (found or error.errors())[0]
    where = ".".join(str(x) for x in first["loc"] if x not in ("str", "SourceRecipe"))
    inside: dict[str, type[BaseModel]] = {"view": ViewRecipe, "sources": SourceRecipe}
    known = list(inside.get(str(first["loc"][0]), Recipe).model_fields)
    if first["type"] == "extra_forbidden":
        near = get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
        return UsageError(f"the recipe has an unknown key {where!r}", file=file, remedy=remedy)
    if first["type"] == "missing":
        return UsageError(f"the recipe lacks {where!r}", file=file)
    values = {"found": first["input"]}
    return UsageError(f"the recipe's {where!r} does not fit: {first['msg']}", values=values, file=file)
