"""Values that cannot be meant are one line and status 2, of every option with numbers of every command."""

import math
from pathlib import Path
from typing import Any

import pytest
from longslide import DataOptions, LongslideError, crossval, embed
from longslide.pipeline.cli import COMMANDS, POSITIONAL, command_function, command_parser, main
from longslide.ranges import RANGES, Range, checked

LABELS = {"classes", "positive"}  # numbers that name something


def numeric_options() -> list[tuple[str, str]]:
    """(command, option as it is typed) of all options whose values are numbers."""
    found = []
    for command in COMMANDS:
        for action in command_parser(command)._actions:
            kind = str(getattr(action, "_typehint", None) or action.type)
            if "Literal" in kind and "list" not in kind:
                continue
            if any(word in kind for word in ("int", "float")) and action.dest.rpartition(".")[2] not in LABELS:
                found.append((command, action.option_strings[0]))
    return found


def wrong_values(wanted: Range) -> list[float]:
    """Just outside the range, and what is no number."""
    wrong = [math.nan, math.inf]
    if math.isfinite(wanted.least):
        wrong += [wanted.least - 1, -wanted.least - 7] + ([wanted.least] if wanted.above else [])
    if math.isfinite(wanted.most):
        wrong += [wanted.most + 1] + ([wanted.most] if wanted.below else [])
    return [value for value in wrong if value not in wanted]


def name_of(option: str) -> str:
    return option.lstrip("-").rpartition(".")[2].replace("-", "_")


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), numeric_options())
def test_an_option_out_of_its_range_is_one_line_and_status_2(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = RANGES.get(f"{command}.{name_of(option)}") or RANGES[name_of(option)]
    words = [command, *needed(command)]
    whole = "int" in str(next(a for a in command_parser(command)._actions if option in a.option_strings)._typehint)
    for value in wrong_values(wanted):
        if whole and not math.isfinite(value):
            continue
        text = f"{value:.0f}" if whole else str(value)
        given = (
            f"[{text}, {text}]" if name_of(option) in ("betas", "segment_lengths", "dilated_ratios", "times") else text
        )
        if name_of(option) == "class_weights":
            given = f"[{text}, 1]"
        try:
            status = main([*words, f"{option}={given}"])
        except SystemExit as end:
            status = int(end.code or 0)
        error = capsys.readouterr().err
        assert status == 2, (option, given, error)
        assert len(error.strip().splitlines()) == 1, error
        assert option in error
    assert not list(tmp_path.iterdir()), "nothing was written"


def needed(command: str) -> list[str]:
    """What a command must be given."""
    return {
        "fit": ["--data.features", "f", "--data.table", "t.csv", "--data.task", "binary"],
        "crossval": ["--data.features", "f", "--data.table", "t.csv", "--data.task", "binary"],
        "sweep": ["--data.features", "f", "--data.table", "t.csv", "--data.task", "binary", "--grid.epochs", "1,2"],
        "pretrain": ["--data.features", "f"],
        "test": ["--checkpoint", "c", "--data.features", "f", "--data.table", "t.csv"],
        "embed": ["a.svs", "--output", "o", "--tile-encoder", "uni"],
        "tiles": ["a.svs", "--output", "o"],
        "predict": ["a.svs", "--checkpoint", "c"],
    }.get(command, ["a" for name in POSITIONAL if name in command_function(command).__annotations__])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max_epochs", "0"], "--trainer.max-epochs 0 must be at least 1 or -1"),
        (["--trainer.gradient_clip_val", "-1"], "--trainer.gradient-clip-val -1"),
        (["--model.optimiser.learning_rate", "-1"], "--model.optimiser.learning-rate -1.0 must be above 0"),
        (["--seed", str(2**64)], f"--seed {2**64} must be at least 0 and at most 4294967295"),
        (["--ema", "5"], "--ema 5.0 must be above 0 and below 1"),
        (["--patience", "-1"], "--patience -1 must be at least 1"),
        (["--run", ""], "--run is empty"),
    ],
)
def test_what_the_issue_names_of_training(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    from training_cohort import write_cohort

    assert main(["fit", "--config", "abmil", "--data.task", "binary", *write_cohort(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embed", "a.svs", "--output", "", "--tile-encoder", "uni"], "--output is empty"),
        (["crossval", *needed("crossval"), "--folds", "1"], "--folds 1 must be at least 2"),
        (["demo", "--patients", "3"], "--patients 3 must be at least 12"),
        (["demo", "--device", "meta"], "device 'meta' is not available here"),
        (["demo", "--device", "cuda:99"], "device 'cuda:99' is not available here"),
    ],
)
def test_what_the_issue_names_of_the_others(
    words: list[str], message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_python_is_told_the_same(tmp_path: Path) -> None:
    with pytest.raises(LongslideError, match="--threads 0 must be at least 1"):
        embed(["a.svs"], tmp_path, "uni", threads=0)
    with pytest.raises(LongslideError, match=r"--data\.workers -1 must be at least 0"):
        DataOptions("features", workers=-1)
    with pytest.raises(LongslideError, match="--folds 1 must be at least 2"):
        crossval(DataOptions("features"), folds=1)


def test_a_command_keeps_its_name_its_arguments_and_what_it_returns() -> None:
    @checked
    def embed_one(threads: int = 4, subgroups: str = "", **more: Any) -> tuple[int, str]:
        """Doc."""
        return threads, subgroups

    assert embed_one() == (4, "")
    assert embed_one(subgroups="") == (4, "")
    assert embed_one.__doc__ == "Doc."


@pytest.mark.parametrize(
    ("wanted", "inside", "outside", "text"),
    [
        (Range(0, 1), [0, 0.5, 1], [-0.1, 1.1, math.nan], "at least 0 and at most 1"),
        (Range(0, 1, above=True, below=True), [0.5], [0, 1], "above 0 and below 1"),
        (Range(1, also=frozenset({-1.0})), [1, -1, 10**9], [0, -2, math.inf], "at least 1 or -1"),
    ],
)
def test_a_range_holds_its_numbers(wanted: Range, inside: list[float], outside: list[float], text: str) -> None:
    assert all(value in wanted for value in inside)
    assert not any(value in wanted for value in outside)
    assert str(wanted) == text
