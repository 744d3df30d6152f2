"""The package as a newcomer meets it."""

import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import longslide
import pytest
from longslide.models.tile_encoder.spec import list_tile_encoders, load_tile_encoder_spec

ROOT = Path(__file__).parent.parent


def test_importing_longslide_does_not_import_torch() -> None:
    code = "import sys, longslide; assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", longslide.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(longslide, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        longslide.no_such_thing  # noqa: B018


def test_the_version_is_that_of_the_installed_package() -> None:
    assert metadata("longslide")["Version"] == longslide.__version__


@pytest.mark.parametrize("name", list_tile_encoders())
def test_the_readme_states_the_facts_of_each_tile_encoder(name: str) -> None:
    spec = load_tile_encoder_spec(name)
    gated = "yes" if spec.gated else "no"
    tiles = f"{spec.tile_px} px at {spec.mpp:g}"
    row = f"| `{name}` | {spec.dim:,} | {tiles} | {gated} | {spec.licence} | [paper]({spec.paper}) |"
    assert row in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
