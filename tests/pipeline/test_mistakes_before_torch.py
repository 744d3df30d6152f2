"""A mistake in a path, a column or a name is said before torch or Lightning is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from longslide.pipeline.cli import COMMANDS
from training_cohort import write_cohort

CODE = """
import sys
from longslide.pipeline.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
heavy = {'torch', 'lightning', 'timm'} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 6)
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit"], "--data.features must be given"),
        (["fit", "--data.features", "nowhere"], "nowhere"),
        (["fit", "--config", "no-such-recipe"], "neither a file nor a recipe"),
        (["fit", "--data.features", "{}/features", "--data.table", "none.csv", "--data.task", "binary"], "none.csv"),
        (
            [
                "fit",
                "--data.features",
                "{}/features",
                "--data.table",
                "{}/cohort.csv",
                "--data.task",
                "binary",
                "--data.label",
                "lable",
                "--trainer.max-epochs",
                "3",
            ],
            "lable",
        ),
        (
            ["fit", "--data.features", "{}/features", "--model.aggregator", "abml"],
            "no aggregator 'abml': there are longnet",
        ),
        (["crossval", "--data.features", "{}/features"], "no labels"),
        (["pretrain"], "--data.features must be given"),
        (["test", "--checkpoint", "none.ckpt", "--data.features", "{}/features"], "none.ckpt: no such checkpoint"),
        (["test", "--checkpoint", "{}", "--data.features", "{}/features"], "a folder; test takes one checkpoint"),
        (["embed", "{}/a.png", "--output", "{}/out", "--tile-encoder", "unii"], "did you mean"),
        (
            ["embed", "{}/a.png", "--output", "{}/out", "--tile-encoder", "gigapath", "--slide-encoder", "gigapth"],
            "did you mean gigapath",
        ),
        (["predict", "{}/a.png", "--checkpoint", "none.ckpt"], "none.ckpt: no such checkpoint"),
        (["compare", "one", "two"], "one: no such folder"),
        (["report", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else value[:30],
)
def test_it_is_one_line_and_torch_has_not_been_imported(words: list[str], said: str, cohort: Path) -> None:
    from PIL import Image

    Image.new("RGB", (600, 600)).save(cohort / "a.png")
    result = run(*(word.replace("{}", str(cohort)) for word in words))
    assert result.returncode == 2, result.stderr
    assert said in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_does_not_import_torch(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0, result.stderr
    for internal in ("<lambda>", "_facts", "<function"):
        assert internal not in result.stdout


def test_longslide_alone_lists_the_commands_in_the_order_of_the_work() -> None:
    result = run()
    assert result.returncode == 0, result.stderr
    places = [result.stdout.index(f"    {command} ") for command in COMMANDS]
    assert places == sorted(places)


def test_dashes_and_underscores_are_one_dialect(cohort: Path) -> None:
    same = [
        run("fit", "--data.features", "f", f"--data.max{mark}tokens=7", f"--checkpoint{mark}every{mark}n{mark}steps", "5",
            f"--model.aggregator.ffn{mark}width", "9", f"--print{mark}config").stdout
        for mark in "-_"
    ]  # fmt: skip
    assert same[0] == same[1]
    for line in ("max_tokens: 7", "ffn_width: 9", "checkpoint_every_n_steps: 5"):
        assert line in same[0]


def test_the_help_of_fit_has_the_data_first_and_the_trainer_on_demand() -> None:
    text = run("fit", "--help").stdout
    assert text.index("--data.features FEATURES\n") < text.index("--model.aggregator AGGREGATOR")
    assert "--help-trainer" in text
    assert "--trainer.max-epochs" not in text
    command = [sys.executable, "-m", "longslide", "fit", "--help-trainer"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=200).stdout
    assert "--trainer.max-epochs" in listed
