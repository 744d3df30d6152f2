"""What others may plug in: classes chosen by a registered name or by a dotted path.

Each place for plug-ins (slide reader, tissue segmenter, aggregator, ...) has a base class and one `Registry`. A name is
registered here, by `longslide.register`, or by an installed package's entry point; a dotted path (`mypkg.MyMIL` or
`mypkg.mil:MyMIL`) needs no registration.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import wraps
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, Self, TypeVar

from .errors import LongslideError

T = TypeVar("T", bound="Plugin")

_registries: "list[Registry[Any]]" = []


class Plugin:
    """Base of the base classes: it keeps what the constructor was called with, for the record.

    Attributes:
        GIVEN: Arguments of the constructor that the caller supplies, and not the user: they are not options.
    """

    GIVEN: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]

    @property
    def options(self) -> dict[str, Any]:
        """The options this was made with, by the names of the constructor's arguments, defaults included."""
        if is_dataclass(self):
            return {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        return dict(plain_numbers(vars(self).get("_options", {})))


def plain_numbers(value: Any) -> Any:
    """A value without subclasses of int and float, such as jsonargparse's: files of weights and YAML do not know them."""
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain_numbers, value))
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if kind is None else kind(value)


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @wraps(init)
    def remember(self: Plugin, *args: Any, **kwargs: Any) -> None:
        if "_options" not in vars(self):  # else a subclass's constructor is calling this one
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError:
                init(self, *args, **kwargs)  # raises it with the name of the class
                raise
            bound.apply_defaults()
            named = dict(list(bound.arguments.items())[1:])
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    named |= named.pop(name, {})
            # Not setattr: a torch module takes attributes only after its own constructor ran.
            vars(self)["_options"] = {name: value for name, value in named.items() if name not in self.GIVEN}
        init(self, *args, **kwargs)

    return remember


@dataclass(frozen=True)
class Chosen:
    """A plug-in that is chosen by name and not made yet.

    Attributes:
        class_path: Its registered name or dotted path.
        init_args: Its options, by the names of its constructor's arguments.
    """

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)

    registry: "ClassVar[Registry[Any]]"

    @classmethod
    def of(cls, choice: "str | Self") -> Self:
        """The choice of a name alone, or the choice as it is."""
        return cls(choice) if isinstance(choice, str) else choice


class Registry(Generic[T]):
    """The classes that may stand at one place.

    Args:
        what: What they are, such as `slide reader`; an installed package declares its own under the entry point group
            `longslide.slide_readers`.
        base: Their base class, or `module:Class` where it is imported when first used.
        builtin: Name -> `module:Class` of those of the package, imported when first used, in the order they are tried.

    Attributes:
        builtin: Names of those of the package.
    """

    def __init__(self, what: str, base: type[T] | str, builtin: Mapping[str, str]) -> None:
        self.what = what
        self._base = base
        self.builtin = frozenset(builtin)
        self._paths = dict(builtin)
        self._classes: dict[str, type[T]] = {}
        self._read_entry_points = False
        _registries.append(self)

    @property
    def base(self) -> type[T]:
        """The base class."""
        if isinstance(self._base, str):
            self._base = import_object(self._base, self.what)
        return self._base  # type: ignore[return-value]

    def names(self) -> list[str]:
        """The registered names: those of the package first, then in the order of registration."""
        self._declare_installed()
        return [*self._paths, *(name for name in self._classes if name not in self._paths)]

    def register(self, name: str, cls: type[T]) -> None:
        """Make a class known under a name.

        Raises:
            LongslideError: The name is taken or cannot be one, or the class is of another kind.
        """
        if not name or any(mark in name for mark in ".: /"):
            raise LongslideError(f"{self.what} {name!r}: a name has no dots, colons, slashes or blanks")
        self._check(name, cls)
        if name in self.names() and self.get(name) is not cls:
            raise LongslideError(f"{self.what} {name!r}: the name is taken by {dotted_path(self.get(name))}")
        if name not in self._paths:
            self._classes[name] = cls

    def get(self, choice: str | type[T], *, from_file: bool = False) -> type[T]:
        """The class of a name or a dotted path.

        Args:
            choice: A registered name, a dotted path, or the class itself.
            from_file: Whether the choice was read from a file. A file never causes an import: a dotted path then counts
                only if its module has been imported already, on the user's word.

        Raises:
            LongslideError: No such name, module or attribute, or a class of another kind.
        """
        if not isinstance(choice, str):
            return self._check(repr(choice), choice)
        if choice not in self._classes and choice in self.names():
            self._classes.setdefault(choice, import_object(self._paths[choice], f"{self.what} {choice!r}"))
        if choice in self._classes:
            return self._check(choice, self._classes[choice])
        if "." not in choice and ":" not in choice:
            raise LongslideError(
                f"no {self.what} {choice!r}: there are {', '.join(self.names())}; a class of your own is named by its "
                "dotted path, such as mypkg.MyClass"
            )
        return self._check(choice, import_object(choice, f"{self.what} {choice!r}", from_file=from_file))

    def create(self, choice: str | type[T], *args: Any, from_file: bool = False, **options: Any) -> T:
        """Make an instance.

        Args:
            choice: As for `get`.
            *args: What every constructor of this kind gets.
            from_file: As for `get`.
            **options: Options of this one, of the types of its constructor or as text that says them.

        Raises:
            LongslideError: As for `get`; or the constructor does not take these options.
        """
        cls = self.get(choice, from_file=from_file)
        what = f"{self.what} {self.name_of(cls)}"
        try:
            inspect.signature(cls).bind(*args, **options)
        except TypeError as error:
            known = ", ".join(name for name in inspect.signature(cls).parameters if name not in cls.GIVEN)
            raise LongslideError(f"{what}: {error}; its options are {known or 'none'}") from error
        given = {name: options.pop(name) for name in cls.GIVEN & options.keys()}
        return cls(*args, **given, **_typed(cls, options, what))

    def name_of(self, plugin: T | type[T]) -> str:
        """How a class is recorded: by its registered name, else by its dotted path."""
        cls = plugin if isinstance(plugin, type) else type(plugin)
        path = dotted_path(cls)
        builtin = (name for name, builtin in self._paths.items() if builtin.replace(":", ".") == path)
        own = (name for name, registered in self._classes.items() if registered is cls)
        return next(builtin, None) or next(own, None) or path

    def _check(self, name: str, cls: Any) -> type[T]:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise LongslideError(f"{self.what} {name}: not a class derived from {dotted_path(self.base)}")
        return cls

    def _declare_installed(self) -> None:
        if self._read_entry_points:
            return
        self._read_entry_points = True
        for point in entry_points(group=f"longslide.{self.what.replace(' ', '_')}s"):
            if self._paths.setdefault(point.name, point.value) != point.value:
                raise LongslideError(
                    f"{self.what} {point.name!r}: both {self._paths[point.name]} and {point.value} are installed under "
                    "this name; uninstall one"
                )


def _typed(cls: type[Plugin], options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Options in the types that the constructor's arguments have."""
    if not options:
        return {}
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=set(cls.GIVEN), fail_untyped=False)
    try:
        typed = vars(parser.instantiate(parser.parse_object(dict(options), defaults=True)))
    except ArgumentError as error:
        raise LongslideError(f"{what}: {' '.join(str(error).replace('Parser key', 'option').split())}") from error
    return {name: typed.get(name, value) for name, value in options.items()}


def registry_of(base: Any) -> Registry[Any] | None:
    """The registry of a base class that is imported."""
    return next((registry for registry in _registries if registry._base is base), None)


def register(name: str, cls: type[Plugin]) -> None:
    """Make a class of your own known by a short name, as one of the package is.

    Args:
        name: The name.
        cls: A class derived from `SlideReader`, `TissueSegmenter` or `Aggregator`.

    Raises:
        LongslideError: The name is taken, or the class is of no kind that can be plugged in.
    """
    for registry in _registries:
        if isinstance(cls, type) and issubclass(cls, registry.base):
            return registry.register(name, cls)
    raise LongslideError(f"{name!r}: {cls!r} is not derived from a base class of longslide that can be plugged in")


def registered() -> list[tuple[str, type[Plugin]]]:
    """The classes that were registered in this process."""
    return [
        (name, cls)
        for registry in _registries
        for name, cls in registry._classes.items()
        if name not in registry._paths
    ]


def adopt(plugins: Sequence[tuple[str, type[Plugin]]]) -> None:
    """Register what another process has `registered`."""
    for name, cls in plugins:
        register(name, cls)


def import_plugins(modules: str | Sequence[str] | None) -> None:
    """Import modules by the user's word, so that files may name the classes in them.

    Args:
        modules: Names of modules; several in one text are separated by commas.

    Raises:
        LongslideError: One cannot be imported.
    """
    names = modules.split(",") if isinstance(modules, str) else modules or ()
    for module in names:
        _import(module.strip(), f"--plugins {module.strip()}")


def import_object(path: str, what: str, *, from_file: bool = False) -> Any:
    """What a dotted path names.

    Args:
        path: `package.module.Name` or `package.module:Name`.
        what: What asks for it, for the messages.
        from_file: Whether only modules count that have been imported already.

    Raises:
        LongslideError: No such module, one that cannot be imported, or no such attribute.
    """
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not attribute:
        raise LongslideError(f"{what}: not a dotted path such as mypkg.MyClass or mypkg.module:MyClass")
    if from_file and module_name not in sys.modules:
        raise LongslideError(
            f"{what} is code outside Longslide, which a file alone may not run: if you trust it, import it by "
            f"--plugins {module_name.partition('.')[0]} (in Python by `import`)"
        )
    found: Any = _import(module_name, what)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise LongslideError(f"{what}: {module_name} has no {attribute}")
        found = getattr(found, part)
    return found


def is_factory(choice: object) -> bool:
    """Whether a choice is `package.module:factory`, and neither a name nor the path of a YAML file."""
    return isinstance(choice, str) and ":" in choice and not choice.lower().endswith((".yaml", ".yml"))


def call_factory(path: str, what: str, given: Mapping[str, Any], *, option: str = "", required: bool = False) -> Any:
    """Call `package.module:factory`.

    Args:
        path: The factory.
        what: What asks for it, for the messages.
        given: Arguments: the factory gets those that it takes.
        option: The command line's option for `checkpoint`, which a factory must take if it is given.
        required: Whether it must take all of them.

    Returns:
        What it makes.

    Raises:
        LongslideError: There is no such factory, it needs other arguments, or does not take what was given.
    """
    factory = import_object(path, what)
    if not callable(factory):
        raise LongslideError(f"{what}: {path} is not callable")
    parameters = inspect.signature(factory).parameters
    takes_all = required or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if given.get("checkpoint") is not None and not takes_all and "checkpoint" not in parameters:
        raise LongslideError(f"{what}: {path} takes no argument `checkpoint` for {option} {given['checkpoint']}")
    arguments = {name: value for name, value in given.items() if takes_all or name in parameters}
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise LongslideError(
            f"{what}: {path} cannot be called with {', '.join(arguments) or 'no arguments'} ({error})"
        ) from error
    return factory(**arguments)


def _import(module: str, what: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise LongslideError(
                f"{what}: no module {error.name}; install its package, or put its folder on PYTHONPATH"
            ) from error
        raise LongslideError(f"{what}: {module} needs the module {error.name}; install it") from error
    except Exception as error:  # whatever foreign code does when it is imported
        reason = " ".join(str(error).split())
        raise LongslideError(f"{what}: {module} cannot be imported ({type(error).__name__}: {reason})") from error


def dotted_path(cls: type) -> str:
    """`module.Class`."""
    return f"{cls.__module__}.{cls.__qualname__}"
