"""What ``devec merge`` is told by a recipe, a file of mergekit and ``--set``."""

from __future__ import annotations

from typing import Any


def typed(key: str, text: str) -> Any:
    """The text of --set, or what it means where it is written as a list or entries: ``[{filter: mlp, value: 1}]``."""
    if not text.startswith(("[", "{")):
        return text
    import yaml

    from devec.core.errors import UsageError

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {key}: not YAML: {' '.join(str(error).split())}") from None


def from_recipe(
    sources: tuple[str, ...], base: str | None, settings: tuple[str, ...], o: dict[str, Any]
) -> tuple[tuple[str, ...], str, str | None, dict[str, Any], dict[str, Any]]:
    """A recipe in place of --method; options on the command line win over the recipe's."""
    from devec.api.recipe import read_recipe
    from devec.core.errors import UsageError

    if len(sources) != 1 or not sources[0].endswith((".yaml", ".yml")):
        raise UsageError("merge needs --method, or one recipe file", remedy="Write devec merge RECIPE.yaml -o OUT.")
    recipe = read_recipe(sources[0])
    merged = dict(o)
    for key in ("rank", "energy", "error", "heads_from", "out_dtype", "dtype", "coefficients"):
        if merged.get(key) is None:
            merged[key] = getattr(recipe, key)
    merged["seed"], merged["notes"], merged["chat_template"] = recipe.seed, recipe.notes, recipe.chat_template
    for key in ("include", "exclude"):
        merged[key] = tuple(merged[key]) or tuple(getattr(recipe, key))
    for key, value in recipe.view.model_dump(exclude_none=True).items():
        if merged.get(key) is None:
            merged[key] = value
    return tuple(recipe.references), recipe.method, base or recipe.base, recipe.settings(), merged
