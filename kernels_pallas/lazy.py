"""Names of a package whose modules are imported when first asked for: a user of one method does not wait for all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable, Callable, list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package.

    Type checkers do not see through this, so a package repeats the imports under `TYPE_CHECKING`; a test holds the two
    together.

    Args:
      package: dotted name of the package.
      names: for each module the names it gives; modules of the package itself begin with a dot, and "." gives
        modules.
    """
    home = {name: module for module, given in names.items() for name in given}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if home[name] == ".":
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(home[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, listed, sorted(home)
