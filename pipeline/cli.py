"""The command line: every command is a typed Python function, its options are the function's arguments."""

import argparse
import difflib
import importlib.util
import inspect
import io
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from ..errors import LongslideError
from ..version import __version__
from ..yaml_file import read_yaml
from .parser import OptionParser
from .plugin_options import accept_plugin_names
from .signals import Stopped, end_surely, ending_signals

if TYPE_CHECKING:
    from .train.settings import Command

# Command -> (the module that holds the function of that name, one line for `longslide --help`), in the order of the work.
# A module is imported only when its command is asked for, and imports torch only when it runs.
COMMANDS = {
    "doctor": (".doctor.doctor", "Check slides, weights and this machine before a long run."),
    "embed": (".embed.embed", "Embed slides: one feature file per slide, with tile embeddings and a slide embedding."),
    "merge": (".merge", "Join the summaries of the shards of embed or predict."),
    "tiles": (".tiles.tiles", "Write tiles as pictures: PNG folders or WebDataset shards."),
    "pretrain": (".train.pretrain", "Pretrain a slide encoder on feature files without labels."),
    "fit": (".train.fit", "Train a slide classifier on feature files."),
    "crossval": (".train.crossval", "Train one classifier per fold, and evaluate on the patients each has not seen."),
    "sweep": (".train.sweep", "Try a grid of options in each fold of a cross-validation, by inner folds."),
    "test": (".train.test", "Evaluate a trained classifier on another cohort."),
    "compare": (
        ".report.compare",
        "Compare runs on the same patients: every metric with its interval, and paired differences.",
    ),
    "predict": (
        ".predict.predict",
        "Predict new slides with a trained classifier, and show which tiles raise or lower each prediction.",
    ),
    "report": (
        ".report.report",
        "Write an HTML page over the results of predict: table, overlays, galleries, failures.",
    ),
    "view": (
        ".view.view",
        "Look at slides, tiles, scores and predictions in the browser: deep zoom, layers, regions to draw.",
    ),
    "attention-map": (
        ".attention_map.attention_map",
        "Draw which keys each query sees under an attention pattern, and what it costs.",
    ),
    "export": (
        ".export.export",
        "Write feature files in the layout of another tool, or a trained slide encoder as they are published.",
    ),
    "demo": (".demo", "Run the whole job on synthetic slides: no network, no GPU, a few minutes."),
}

TRAINING: tuple["Command", ...] = ("pretrain", "fit", "crossval", "sweep")
"""Commands with recipes, and with the options of Lightning's Trainer."""

# Arguments that are given without a name, by their name in the function and in YAML.
POSITIONAL = {
    "slides": "Slide files, folders of slides, or tables (CSV, TSV, Parquet, Excel) with a column `slide`.",
    "results": "Output folders of longslide predict.",
    "runs": "Run folders of longslide fit, crossval, sweep or test.",
    "inputs": "Folders of results, features, runs or slides; slide files, feature files, tables of slides or of labels.",
}


def command_function(command: str) -> Callable[..., Any]:
    """The function of a command."""
    module = import_module(COMMANDS[command][0], __package__)
    return getattr(module, command.replace("-", "_"))  # type: ignore[no-any-return]


def command_parser(command: str, *, typed_trainer: bool = False) -> OptionParser:
    """The parser of a command.

    Args:
        command: The command.
        typed_trainer: Whether the options of Lightning's Trainer are checked, for which it is imported.
    """
    function = command_function(command)
    parser = OptionParser(
        prog=f"longslide {command}", description=COMMANDS[command][1], print_config="--print-config", dump_header=None
    )
    names = inspect.signature(function).parameters
    added = set(POSITIONAL) & set(names)
    parser.usage = " ".join(["%(prog)s", *(_usage(name, names[name]) for name in sorted(added)), "[options]"])
    text = "YAML file with any of these options as keys."
    if command in TRAINING:
        from .train.settings import list_recipes

        text += f" Or a recipe by its name: {', '.join(list_recipes(command))}."
    parser.add_argument("--config", action=_config_action(command), help=text)
    if command in TRAINING:
        parser.add_argument(
            "--help-trainer", action=_TrainerHelp, nargs=0, help="List the options of Lightning's Trainer."
        )
        if typed_trainer:
            _add_trainer(parser)
            added.add("trainer")
    for name in added & set(POSITIONAL):
        parser.add_argument(
            name,
            nargs="*",
            type=str,
            default=argparse.SUPPRESS,  # so that none on the command line leaves the YAML key of that name in force
            help=POSITIONAL[name],
        )
    if "data" in names:
        from ..data.cohort.options import DataOptions
        from .train.settings import SETTLED

        parser.add_class_arguments(DataOptions, "data", skip=set(SETTLED[command]))  # type: ignore[index]
        added.add("data")
    parser.add_function_arguments(function, as_group=False, skip=set(added))
    accept_plugin_names(parser)
    return parser


def _usage(name: str, parameter: inspect.Parameter) -> str:
    required = parameter.default is inspect.Parameter.empty
    return f"{name} [{name} ...]" if required else f"[{name} ...]"


def _config_action(command: str) -> type[ActionConfigFile]:
    class Config(ActionConfigFile):
        """A configuration file; for training also a recipe of the package by its name."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            path = str(values)
            if command in TRAINING:
                from .train.settings import recipe_path

                path = recipe_path(command, path)
            if Path(path).is_file():
                try:
                    read_yaml(Path(path), "configuration")
                except LongslideError as error:
                    parser.error(f"--config {error}")
            super().__call__(parser, cfg, path, option_string)  # type: ignore[no-untyped-call]

    return Config


class _TrainerHelp(argparse.Action):
    """Lists the options of Lightning's Trainer, which is imported for that alone."""

    def __call__(self, parser: Any, *_: Any) -> None:
        listing = OptionParser(prog=parser.prog, description="Options of Lightning's Trainer.", add_help=False)
        _add_trainer(listing)
        listing.print_help()
        sys.exit(0)


def _add_trainer(parser: OptionParser) -> None:
    from lightning import Trainer

    parser.add_class_arguments(Trainer, "trainer", instantiate=False)


class _PrintCompletion(argparse.Action):
    """Prints the script by which a shell completes commands and options."""

    def __call__(self, parser: Any, _: Any, shell: Any, option: str | None = None) -> None:
        if importlib.util.find_spec("shtab") is None:
            parser.error(f"{option} needs the package shtab: pip install 'longslide[completion]'")
        print(_top_parser(complete=True).get_completion_script(f"shtab-{shell}"))
        sys.exit(0)


def _top_parser(*, complete: bool = False) -> OptionParser:
    """The parser of `longslide` itself, which lists the commands; for tab completion with all their options."""
    parser = OptionParser(
        prog="longslide", description="Whole-slide images to slide-level predictions.", version=__version__
    )
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=["bash", "zsh", "tcsh"],
        default=argparse.SUPPRESS,
        help="Print the script by which this shell completes commands and options.",
    )
    subcommands = parser.add_subcommands(required=False)
    for name, (_, summary) in COMMANDS.items():
        subparser = command_parser(name) if complete else OptionParser(description=summary)
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def parse(command: str, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command's function from the words after the command.

    Raises:
        SystemExit: Wrong usage, or a question for help.
    """
    parser = command_parser(command)
    parsed = parser.parse_args(words)
    options: dict[str, Any] = dict(vars(parser.instantiate(parsed)))
    del options["config"]
    options.pop("help_trainer", None)
    parameters = inspect.signature(command_function(command)).parameters
    for name in set(POSITIONAL) & set(parameters):
        if not options.get(name) and parameters[name].default is inspect.Parameter.empty:
            parser.error(f"needs {name}: {POSITIONAL[name]}")
    if options.get("trainer"):
        options["data"].read_cohort()  # a mistake there is found before Lightning is imported
        typed = command_parser(command, typed_trainer=True)
        given = typed.parse_args(words, defaults=False)
        options["trainer"] = yaml.safe_load(typed.dump(given, skip_unset=False))["trainer"]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `longslide`; those of the process by default.

    Returns:
        The exit status: 0 when all is well, 1 when something failed, 2 for wrong usage, 130 after Ctrl-C,
        143 after SIGTERM, 129 after SIGHUP, 138 after SIGUSR1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command, words = (argv[0], argv[1:]) if argv else ("--help", [])
    if command not in COMMANDS:
        return _without_command(command, argv)
    messages = logging.StreamHandler(sys.stderr)  # what the library logs is said on the command line
    library = logging.getLogger("longslide")
    level = library.level
    library.addHandler(messages)
    library.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that the terminal's encoding does not have
    with ending_signals() as signals:
        try:
            results = command_function(command)(**parse(command, words))
        except (LongslideError, KeyboardInterrupt) as error:
            if isinstance(error, LongslideError) and signals.last is None:  # else what the signal has led to
                print(f"longslide {command}: {error}", file=sys.stderr)
                return 2
            on = "" if command == "view" else "; the same command goes on from here"
            print(f"longslide {command}: stopped{on}", file=sys.stderr)
            return 128 + error.number if isinstance(error, Stopped) else signals.status
        finally:
            library.removeHandler(messages)
            library.setLevel(level)
    return 0 if all(result.ok for result in (results if isinstance(results, list) else [results])) else 1


def command_line() -> int:
    """What `longslide` calls: `main`, after which the process ends for certain; its exit status."""
    status = main()
    sys.stdout.flush()
    end_surely(status)
    return status


def _without_command(word: str, argv: Sequence[str]) -> int:
    """`longslide` alone and `longslide --help` list the commands."""
    parser = _top_parser()
    if not word.startswith("-"):
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        parser.error(f"{word!r} is not a command" + (f"; did you mean {near[0]}?" if near else ""))
    parser.parse_args([word] if word == "--help" else argv)
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
