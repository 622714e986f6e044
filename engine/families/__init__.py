"""The model families that the engine runs, by the name in a file's `general.architecture`."""

from collections.abc import Mapping

from eldric.engine.families.base import Family
from eldric.engine.families.llama import LLAMA

FAMILIES: Mapping[str, Family] = {family.architecture: family for family in (LLAMA,)}
