"""YAML files from outside."""

from pathlib import Path

import pytest
from longslide.errors import LongslideError
from longslide.pipeline.cli import main
from longslide.yaml_file import read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


def test_a_few_lines_of_aliases_that_stand_for_billions_of_values_are_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMB)
    with pytest.raises(LongslideError, match="aliases stand for more than 1,000,000 values"):
        read_yaml(path, "task")
    with pytest.raises(SystemExit) as end:
        main(["embed", "--config", str(path)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(path) in error


def test_an_alias_of_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("a: &a [*a]")
    with pytest.raises(LongslideError, match=str(path)):
        read_yaml(path, "task")


def test_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("defaults: &d {width: 32}\nfirst: *d\nsecond: {<<: *d, depth: 2}\n")
    content = read_yaml(path, "task")
    assert content["first"] == {"width": 32}
    assert content["second"] == {"width": 32, "depth": 2}
