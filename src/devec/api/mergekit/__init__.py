"""mergekit's YAML files, read as merges of devec (docs/mergekit.md)."""

from devec.api.mergekit.plan import Plan, is_mergekit, read

__all__ = ["Plan", "is_mergekit", "read"]
