"""Plug-ins on the command line: `--tissue NAME` or a dotted path, and `--tissue.<option>` of its constructor.

jsonargparse knows classes by their import path; this lets registered names stand for them.
"""

from collections.abc import Iterator
from typing import Any, cast, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._typehints import ActionTypeHint

from ..registry import Registry, dotted_path, registry_of


class PluginAction(ActionTypeHint):
    """An option whose value is a plug-in, by registered name or dotted path; the first registered one by default."""

    registry: Registry[Any]

    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        value = self._with_class_path(value)
        return super()._check_type(value, append=append, cfg=cfg, mode=mode)  # type: ignore[no-untyped-call]

    def _with_class_path(self, value: Any) -> Any:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = yaml.safe_load(value)
        if isinstance(value, str) and value != "null":
            return dotted_path(self.registry.get(value))
        if isinstance(value, dict | Namespace) and isinstance(value.get("class_path"), str):
            value["class_path"] = dotted_path(self.registry.get(value["class_path"]))
        return value


def accept_plugin_names(parser: ArgumentParser) -> None:
    """Let the options of a parser that take a plug-in accept registered names."""
    for action in parser._actions:
        if not isinstance(action, ActionTypeHint):
            continue
        registry = next((found for part in _parts(action._typehint) if (found := registry_of(part))), None)
        if registry is not None:
            action.__class__ = PluginAction
            cast(PluginAction, action).registry = registry
            if action.default is None:
                default = dotted_path(registry.get(registry.names()[0]))
                action.default = Namespace(class_path=default)  # type: ignore[no-untyped-call]


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in get_args(hint):
        yield from _parts(part)
