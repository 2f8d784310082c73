"""Imports modules that are slow to import when a test first uses them, because each worker collects all files."""

import importlib
from typing import Any


class Later:
    """Has the attributes of a module."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
