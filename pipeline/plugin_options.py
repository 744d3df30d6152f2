"""Plug-ins on the command line: `--tissue NAME` or a dotted path, and `--tissue.<option>` of its constructor.

jsonargparse knows classes by their import path; this lets registered names stand for them.
"""

import sys
from collections.abc import Iterator
from typing import Any, cast, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._actions import _ActionConfigLoad, _ActionHelpClassPath, remove_actions
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg

from ..registry import Chosen, Registry, dotted_path, registry_of
from .parser import OptionParser


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


class ChoiceAction(ActionTypeHint):
    """An option whose value is a `Chosen`: nothing is imported before it is made, so its options are checked only then.

    `--x NAME`, `--x.<option> VALUE`; in YAML a name, or `class_path` and `init_args`.
    """

    choice: type[Chosen]

    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        before = cfg.get(self.dest) if cfg else None
        before = self.choice.of(self.default if before is None else before)
        if isinstance(value, NestedArg):
            return self.choice(before.class_path, dict(before.init_args) | {value.key: yaml.safe_load(value.val)})
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = yaml.safe_load(value)
        if isinstance(value, dict | Namespace):
            content = value.as_dict() if isinstance(value, Namespace) else dict(value)
            value = self.choice(content.pop("class_path", before.class_path), content.pop("init_args", None) or {})
            if content or not isinstance(value.class_path, str) or not isinstance(value.init_args, dict):
                raise TypeError(f'Parser key "{self.dest}": has the keys class_path (text) and init_args (a mapping)')
        chosen = self.choice.of(value)
        registry = chosen.registry
        if not any(mark in chosen.class_path for mark in ".:") and chosen.class_path not in registry.names():
            registry.get(chosen.class_path)  # raises, with the names there are
        if isinstance(value, str) and value == before.class_path:
            return before if before.init_args else value
        return value if isinstance(value, str) or chosen.init_args else chosen.class_path

    def instantiate_classes(self, value: Any) -> Any:
        """The choice itself: what is chosen is made where it is needed."""
        return value

    def serialize(self, value: Any, dump_kwargs: Any = None) -> Any:
        """Plain types."""
        if not isinstance(value, Chosen):
            return value
        return {"class_path": value.class_path, "init_args": dict(value.init_args)}


class PluginHelp(_ActionHelpClassPath):
    """`--x.help NAME` lists the options of a plug-in, by registered name or dotted path; the first one by default."""

    registry: Registry[Any]

    def __call__(self, parser: Any, _: Any, name: Any, option: str | None = None) -> None:
        """Print them."""
        name = name or self.registry.names()[0]
        cls = self.registry.get(name)
        listing = OptionParser(prog=f"{option} {name}", usage="%(prog)s", add_help=False)
        listing.add_class_arguments(cls, self.dest.removesuffix(".help"), skip=set(cls.GIVEN))
        remove_actions(listing, (_ActionConfigLoad,))  # type: ignore[no-untyped-call]
        listing.print_help()
        sys.exit(0)


def accept_plugin_names(parser: ArgumentParser) -> None:
    """Let the options of a parser that take a plug-in accept registered names."""
    for action in parser._actions:
        if not isinstance(action, ActionTypeHint | _ActionHelpClassPath):
            continue
        choice = next((part for part in _parts(action._typehint) if is_choice(part)), None)
        registry: Registry[Any] | None = getattr(choice, "registry", None) or next(
            (found for part in _parts(action._typehint) if (found := registry_of(part))), None
        )
        if registry is not None and isinstance(action, _ActionHelpClassPath):
            _list_options(action, registry)
        elif choice is not None:
            action.__class__ = ChoiceAction
            cast(ChoiceAction, action).choice = choice
        elif registry is not None:
            action.__class__ = PluginAction
            cast(PluginAction, action).registry = registry
            if action.default is None:
                default = dotted_path(registry.get(registry.names()[0]))
                action.default = Namespace(class_path=default)  # type: ignore[no-untyped-call]


def _list_options(action: _ActionHelpClassPath, registry: Registry[Any]) -> None:
    action.__class__ = PluginHelp
    cast(PluginHelp, action).registry = registry
    action.nargs, action.metavar = "?", "NAME"
    action.help = f"List the options of one: {', '.join(registry.names())}, or a class by its dotted path."


def is_choice(hint: Any) -> bool:
    """Whether a type is a `Chosen`."""
    return isinstance(hint, type) and issubclass(hint, Chosen)


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in get_args(hint):
        yield from _parts(part)
