"""The command line as users meet it: subprocesses, exit statuses, help, YAML."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from longslide.pipeline.cli import COMMANDS, TRAINING, command_function, command_parser, main


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longslide", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_help_names_every_command_without_importing_torch() -> None:
    code = (
        "import sys; from longslide.pipeline.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'timm', 'cv2', 'pandas', 'openslide'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--config" in text
    assert "(type:" not in text.replace(". (type:", "").replace(": (type:", ""), "an option has no text before its type"
    assert "_" not in "".join(word for word in text.split() if word.startswith("--"))


def test_help_of_a_command_does_not_import_torch() -> None:
    code = (
        "import sys; from longslide.pipeline.cli import main\n"
        "try: main(['embed', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


OWN_IN_EACH_COMMAND = {"slides", "tile_encoder", "slide_encoder", "checkpoint", "features", "model", "output", "run"}
# Of Lightning in `test`, of masks in `pretrain`, of a table in `compare`, of a person who waits in `view`.
OWN_IN_EACH_COMMAND |= {"precision", "patience", "subgroups", "slide_timeout"}


def test_an_option_that_several_commands_have_is_the_same_in_each() -> None:
    first: dict[str, tuple[str, object, object]] = {}
    for command in COMMANDS:
        for name, option in inspect.signature(command_function(command)).parameters.items():
            other, kind, default = first.setdefault(name, (command, option.annotation, option.default))
            same = (kind, default) == (option.annotation, option.default)
            assert same or name in OWN_IN_EACH_COMMAND, f"--{name} of {other} and of {command}"


def test_the_course_of_training_is_explained_alike_by_every_command_that_trains() -> None:
    texts = [{one.dest: one.help for one in command_parser(command)._actions} for command in TRAINING]
    for name in ("trainer", "epochs", "min_steps", "patience", "ema", "checkpoint_every_n_steps", "log_file"):
        assert len({text[name] for text in texts}) == 1, name


OPTIONS = ["embed", "a.svs", "--output", "o", "--tile-encoder", "uni"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["embd"], "did you mean embed?"),
        (["embed"], "output"),
        (["embed", "--output", "o", "--tile-encoder", "uni"], "needs slides"),
        (["embed", "a.svs", "--tile-encoder", "uni"], "output"),
        ([*OPTIONS, "--tile-px", "many"], "--tile-px cannot be many"),
        ([*OPTIONS, "--tile-mpp", "nan"], "--tile-mpp cannot be nan"),
        ([*OPTIONS, "--batch-size", "x"], "--batch-size cannot be x;"),
        (
            [*OPTIONS, "--precision", "half"],
            "--precision cannot be half, but 'auto', 'float32', 'float16', 'bfloat16', 'float8';",
        ),
        (["attention-map", "--segment-lengths", "16,32"], "cannot be 16,32, but a list such as [16,32];"),
        ([*OPTIONS, "--no-such-option", "1"], "--no-such-option"),
        ([*OPTIONS, "--pool", "max"], "max"),
        (["embed", "--config", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_wrong_usage_is_one_line_with_status_2(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("longslide")
    assert named in line
    assert "--help" in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("slides: a.svs\noutput: o\ntile_encoder: uni\n", "`slides: [a.svs]`"),
        ("slides: [a.svs]\noutput: o\ntile_encoder: uni\ntile_pixels: 3\n", "tile_pixels"),
        ("slides: [a.svs]\noutput: o\ntile_encoder: uni\ntile_px: many\n", "--tile-px cannot be many"),
        ("slides: [", "job.yaml, line 1, column 10: not YAML: expected the node content"),
    ],
)
def test_a_wrong_yaml_file_is_one_line(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["embed", "--config", str(tmp_path / "job.yaml")])
    [line] = capsys.readouterr().err.splitlines()
    assert named in line


def test_what_print_config_writes_is_the_same_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["embed", "b.svs", *OPTIONS[1:], "--tile-px", "224", "--overwrite", "--print-config"])
    first = capsys.readouterr().out
    (tmp_path / "job.yaml").write_text(first)
    with pytest.raises(SystemExit, match="0"):
        main(["embed", "--config", str(tmp_path / "job.yaml"), "--print-config"])
    assert capsys.readouterr().out == first
    assert "tile_px: 224" in first
    assert "- b.svs" in first


DROPPED = """
import os, signal, sys, time
from longslide.pipeline import cli, demo
class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
def job(output: str = ".", device: str = "cpu"):
    Slow()
    time.sleep(60)
    return []
demo.demo = job
sys.exit(cli.main(["demo"]))
"""


def test_ctrl_c_while_an_object_is_destroyed_is_not_lost() -> None:
    """It ends a wait as well, here of a minute."""
    result = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, timeout=50)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    assert "goes on from here" in result.stderr


def test_an_option_that_must_be_given_is_named_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "a.svs"])
    assert capsys.readouterr().err.startswith("longslide predict: --checkpoint must be given; see longslide predict")


def test_a_user_mistake_is_one_line(tmp_path: Path) -> None:
    result = run("embed", tmp_path / "none.svs", "--output", tmp_path / "out", "--tile-encoder", "uni")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "none.svs" in result.stderr


def test_every_option_is_also_a_yaml_key(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        f"slides: [{tmp_path}/none.svs]\noutput: {tmp_path}/out\ntile_encoder: uni\ntile_px: 224\n"
    )
    result = run("embed", "--config", tmp_path / "job.yaml", "--print-config")
    assert result.returncode == 0, result.stderr
    assert "tile_px: 224" in result.stdout
    assert "none.svs" in result.stdout
    result = run("embed", "--config", tmp_path / "job.yaml")
    assert result.returncode == 2
    assert "none.svs" in result.stderr


COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_longslide
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["pre"], {"pretrain", "predict"}),
        (["embed", "--tile-"], {"--tile-encoder", "--tile-checkpoint", "--tile-mpp", "--tile-px"}),
        (["fit", "--data.feat"], {"--data.features"}),
        (["fit", "--monitor", "val_"], {"val_metric", "val_loss"}),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_bash_completes_commands_options_and_values(
    words: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = tmp_path / "longslide.bash"
    script.write_text(capsys.readouterr().out)
    command = ["bash", "-c", COMPLETE, "bash", str(script), "longslide", *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert set(result.stdout.split()) == offered


def test_completion_is_printed_for_three_shells_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("zsh", "tcsh"):
        with pytest.raises(SystemExit, match="0"):
            main(["--print-completion", shell])
        script = capsys.readouterr().out
        assert all(command in script for command in COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        main(["--print-completion", "fish"])
    assert "'bash', 'zsh', 'tcsh'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["embed", "--tissue.help", "grandqc"], "--tissue.artefact-checkpoint"),
        (["embed", "--tissue.help"], "--tissue.keep-ink"),
        (["fit", "--model.aggregator.help", "transmil"], "--model.aggregator.landmarks"),
        (["fit", "--model.aggregator.help", "longslide.models.aggregators.abmil.ABMIL"], "--model.aggregator.width"),
    ],
)
def test_the_options_of_a_plug_in_are_listed_by_its_name(
    words: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert shown in capsys.readouterr().out


def test_help_for_an_unknown_plug_in_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "--tissue.help", "nope"]) == 2
    assert "there are optical-density, hest, grandqc" in capsys.readouterr().err
