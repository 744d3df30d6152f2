"""Recipes: YAML files of the package, found by name or by path."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from longslide.pipeline.cli import main
from longslide.pipeline.train.settings import list_recipes, recipes


def within(part: Any, whole: Any) -> bool:
    """Whether every value of a nested mapping stands in another one."""
    if isinstance(part, dict):
        return all(name in whole and within(value, whole[name]) for name, value in part.items())
    return part == whole


def test_every_recipe_is_a_yaml_of_known_options() -> None:
    assert {"binary", "multiclass", "multilabel", "ordinal", "regression", "survival", "abmil", "transmil"} <= set(
        list_recipes()
    )
    for name in list_recipes():
        result = main_prints_config("fit", "--config", name, "--data.features", "f", "--data.table", "t.csv")
        recipe = yaml.safe_load((recipes("fit") / f"{name}.yaml").read_text())
        assert within(recipe, result), name


def test_a_recipe_is_found_by_its_path_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = main_prints_config("fit", "--config", "configs/fit/transmil.yaml", "--data.features", "f")
    assert config["model"]["aggregator"]["class_path"] == "transmil"


def main_prints_config(*words: str) -> dict:
    import contextlib
    import io

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), pytest.raises(SystemExit):
        main([*words, "--print_config"])
    return yaml.safe_load(stream.getvalue())
