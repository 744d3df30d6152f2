"""The package as a newcomer meets it."""

import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import docstring_parser
import longslide
import pytest
import yaml
from longslide.models.slide_encoder.spec import PublishedSpec, list_slide_encoders, load_slide_encoder_spec
from longslide.models.tile_encoder.spec import load_tile_encoder_spec
from longslide.pipeline.cli import COMMANDS, command_function

ROOT = Path(__file__).parent.parent


def test_importing_longslide_does_not_import_torch() -> None:
    code = "import sys, longslide; assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", longslide.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(longslide, name) is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_function_of_its_name(command: str) -> None:
    assert getattr(longslide, command.replace("-", "_")) is command_function(command)


FUNCTIONS = [name for name in longslide.__all__ if inspect.isfunction(getattr(longslide, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_public_function_is_explained(name: str) -> None:
    function = getattr(longslide, name)
    explained = {one.arg_name.lstrip("*") for one in docstring_parser.parse(inspect.getdoc(function) or "").params}
    assert explained == set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_public_function_gives_is_public(name: str) -> None:
    given = str(inspect.signature(getattr(longslide, name)).return_annotation)
    own = {word for word in re.findall(r"[\w.]+", given) if word.startswith("longslide.") or word[0].isupper()}
    assert {word.rpartition(".")[2] for word in own - {"None"}} <= set(longslide.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        longslide.no_such_thing  # noqa: B018


def test_the_version_is_that_of_the_installed_package() -> None:
    assert metadata("longslide")["Version"] == longslide.__version__


def test_every_room_and_root_file_goes_into_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = {path.name for path in ROOT.glob("*.py")} - {"hatch_build.py"}
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]) == rooms | files | {"py.typed"}


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for room in ROOT.glob("*/__init__.py") for path in room.parent.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_citation_names_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == longslide.__version__
    assert citation["license"] == metadata("longslide")["License-Expression"]


@pytest.mark.parametrize("name", list_slide_encoders())
def test_the_documentation_states_the_facts_of_each_slide_encoder(name: str) -> None:
    import torch

    spec = load_slide_encoder_spec(name)
    with torch.device("meta"):
        width = longslide.create_slide_encoder(name, checkpoint="random").width
    gated = "yes" if spec.gated else "no"
    row = (
        f"| `{name}` | `{spec.tile_encoder}` | {spec.tile_dim:,} | {width:,} | {gated} | {spec.licence} | {spec.shown} "
        f"| [paper]({spec.paper}) |"
    )
    assert row in (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", list_slide_encoders())
def test_what_a_slide_encoder_reads_is_a_tile_encoder_of_the_package(name: str) -> None:
    spec = load_slide_encoder_spec(name)
    assert load_tile_encoder_spec(spec.tile_encoder).dim == spec.tile_dim


def test_what_was_shown_by_code_has_numbers_of_that_code() -> None:
    tests = (ROOT / "tests" / "models" / "slide_encoder" / "reference").glob("*.npz")
    references = {path.stem for path in tests}
    for name in list_slide_encoders():
        spec = load_slide_encoder_spec(name)
        if spec.shown == "code" and isinstance(spec, PublishedSpec):
            assert spec.architecture in references
