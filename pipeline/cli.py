"""The command line: every command is a typed Python function, its options are the function's arguments."""

import argparse
import inspect
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ..errors import LongslideError
from ..version import __version__
from .plugin_options import accept_plugin_names

# Command -> (the module that holds the function of that name, one line for `longslide --help`).
# A module is imported only when its command is asked for, and imports torch only when it runs.
COMMANDS = {
    "doctor": (".embed.doctor", "Check slides, weights and this machine before the GPU hours are spent."),
    "embed": (".embed.embed", "Embed slides: one feature file a slide, with tile embeddings and a slide embedding."),
    "predict": (
        ".predict.predict",
        "Predict new slides with a trained classifier, and show which tiles speak for and against.",
    ),
    "report": (
        ".report.report",
        "Write an HTML page over the results of predict: table, overlays, galleries, failures.",
    ),
    "compare": (
        ".report.compare",
        "Compare runs on the same patients: every metric with its interval, and paired differences.",
    ),
    "attention-map": (
        ".attention_map.attention_map",
        "Draw which keys each query sees under an attention pattern, and what it costs.",
    ),
    "demo": (".demo", "Run the whole job on synthetic slides: no network, no GPU, a few minutes."),
}

# Commands whose options are those of trainer, data module and model: they take the words after them.
TRAINING_COMMANDS = {
    "fit": (".train.fit", "Train a slide classifier on feature files, or pretrain a slide encoder."),
    "crossval": (".train.crossval", "Train a classifier a fold, and evaluate on the patients each has not seen."),
    "test": (".train.test", "Evaluate a trained classifier on another cohort."),
}


# Arguments that are given without a name, by their name in the function and in YAML.
POSITIONAL = {
    "slides": "Slide files, folders of slides, or tables (CSV, TSV, Parquet, Excel) with a column `slide`.",
    "results": "Output folders of longslide predict.",
    "runs": "Run folders of longslide fit, crossval or test.",
}


def refused_value(message: str) -> tuple[str, str] | None:
    """The option of which a message of jsonargparse refuses the value, and `cannot be ...` with the choices there are."""
    value = re.search(r'key "(\S+)":.*(?:Given|Got) value: (.*)', message, re.DOTALL)
    if value is None:
        return None
    choices = re.search(r"Literal\[([^]]*)\]", message)
    return value[1], f"cannot be {value[2]}" + (f", but {choices[1]}" if choices else "")


class _Parser(ArgumentParser):
    """Options spelt as users type them: `--tile-px` for the argument `tile_px`, a bare `--overwrite` for a bool."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("type") is bool:
            kwargs |= {"nargs": "?", "const": True}
        names = (name.replace("_", "-") if name.startswith("--") else name for name in args)
        return super().add_argument(*names, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line, instead of the usage of all options and a paragraph on types."""
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        if refused := refused_value(message):
            message = f"--{refused[0].replace('_', '-')} {refused[1]}"
        elif "does not support item assignment" in message:  # `slides: a.svs` in a YAML file
            message = "slides must be a list in a YAML file: `slides: [a.svs]`"
        elif "arguments are required:" in message and (missing := re.findall(r"([a-z-]+)\.([a-z_]+)", message)):
            command = f"longslide {missing[0][0]}"
            message = f"{', '.join('--' + name.replace('_', '-') for _, name in missing)} must be given"
        message = " ".join(message.split()).removeprefix(f"{command} ").rstrip(".")
        print(f"{command}: {message}; see {command} --help", file=sys.stderr)
        sys.exit(2)


def _command_function(command: str) -> Callable[..., Sequence[Any]]:
    module = import_module(COMMANDS[command][0], __package__)
    return getattr(module, command.replace("-", "_"))  # type: ignore[no-any-return]


def _add_command_arguments(parser: _Parser, function: Callable[..., Any]) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of these options as keys.")
    positional = set(POSITIONAL) & set(inspect.signature(function).parameters)
    for name in positional:
        parser.add_argument(
            name,
            nargs="*",
            type=str,
            default=argparse.SUPPRESS,  # so that none on the command line leaves the YAML key of that name in force
            help=POSITIONAL[name],
        )
    parser.add_function_arguments(function, as_group=False, skip=set(positional))
    accept_plugin_names(parser)


def _parser(command: str | None) -> _Parser:
    parser = _Parser(
        prog="longslide",
        description="Whole-slide images to slide-level predictions.",
        version=__version__,
    )
    subcommands = parser.add_subcommands(required=True)
    for name, (_, summary) in (COMMANDS | TRAINING_COMMANDS).items():
        subparser = _Parser(description=summary, print_config="--print-config")
        if name == command:
            _add_command_arguments(subparser, _command_function(name))
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def _ctrl_c_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Python drops a Ctrl-C that comes while an object is destroyed, a slide's cache for one: repeat it soon after."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        repeat = (threading.main_thread().ident, signal.SIGINT)  # to that thread: it ends a wait, too
        threading.Timer(0.05, signal.pthread_kill, repeat).start()
    else:
        sys.__unraisablehook__(dropped)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `longslide`; those of the process by default.

    Returns:
        The exit status: 0 when all is well, 1 when something failed, 2 for wrong usage, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    if command in TRAINING_COMMANDS and argv[0] == command:
        return _train(command, argv[1:])
    parser = _parser(command if command in COMMANDS else None)
    try:
        arguments = parser.instantiate_classes(parser.parse_args(argv))
    except LongslideError as error:  # a plug-in that does not exist, or does not take its options
        print(f"longslide {command}: {error}", file=sys.stderr)
        return 2
    command = str(arguments.subcommand)
    options = arguments[command].as_dict()
    del options["config"]
    function = _command_function(command)
    for name in set(POSITIONAL) & set(inspect.signature(function).parameters):
        if not options.get(name):
            parser.error(f"longslide {command} needs {name}: {POSITIONAL[name]}")
    default_hook, sys.unraisablehook = sys.unraisablehook, _ctrl_c_again
    try:
        results = function(**options)
    except LongslideError as error:
        print(f"longslide {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"longslide {command}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        sys.unraisablehook = default_hook
    return 0 if all(result.ok for result in results) else 1


def _train(command: str, argv: Sequence[str]) -> int:
    module = import_module(TRAINING_COMMANDS[command][0], __package__)
    default_hook, sys.unraisablehook = sys.unraisablehook, _ctrl_c_again
    try:
        return int(getattr(module, command)(argv))
    except KeyboardInterrupt:
        print(f"longslide {command}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LongslideError):
            cause = cause.__cause__  # jsonargparse wraps what is raised while it builds objects
        if cause is None:
            raise
        print(f"longslide {command}: {cause}", file=sys.stderr)
        return 2
    finally:
        sys.unraisablehook = default_hook


if __name__ == "__main__":
    sys.exit(main())
