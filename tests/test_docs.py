"""README and docs name commands, options, files and encoders that exist."""

import ast
import inspect
import re
import tomllib
from pathlib import Path

import longslide
import pytest
import yaml
from lightning import Trainer
from longslide.data.cohort.augmentation import Augmentation
from longslide.models.tile_encoder.encoder import create_tile_encoder, load_tile_encoder_spec
from longslide.pipeline.cli import COMMANDS, command_parser
from longslide.pipeline.report.wording import METRIC_NAMES
from longslide.pipeline.train.settings import list_recipes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Those in running text, and in blocks that `test_docs_run.py` does not run."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    marked = re.findall(r"<!-- not run: .*? -->\n```bash\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`(longslide [^`]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    return re.findall(r"longslide [a-z][^\n#|&;]*", "\n".join([*marked, *inline]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_documentation_exist(page: Path) -> None:
    for command in commands(page):
        name, *words = command.split()[1:]
        options = {word[2:].split("=")[0] for word in words if word.startswith("--")}
        assert name in COMMANDS, command
        parser = command_parser(name)
        for option in options:
            if option.startswith("trainer."):
                assert option.split(".")[1].replace("-", "_") in inspect.signature(Trainer).parameters, command
            else:
                option = option.removeprefix("grid.")  # of a sweep, values for any option
                assert f"--{option}" in parser._option_string_actions, command


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_documentation_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            file, _, heading = target.partition("#")
            file = file or page.name
            assert (page.parent / file).is_file(), target
            if not heading:
                continue
            headings = re.findall(r"^#+ (.*)$", (page.parent / file).read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], target


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: longslide\.(\w+)$", text, re.MULTILINE)
    assert sorted(names) == sorted(set(longslide.__all__) - {"__version__"})


def test_every_page_is_in_the_navigation_of_the_documentation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = re.findall(r"[\w/-]+\.md", str(navigation))
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_augmentations_in_the_documentation_exist() -> None:
    [names] = re.findall(r"augment\.\{(.*?)\}", (ROOT / "docs" / "train.md").read_text(encoding="utf-8"))
    assert set(names.split(",")) <= set(inspect.signature(Augmentation).parameters)


def test_the_example_of_an_encoder_is_one(tmp_path: Path) -> None:
    [content] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "my-encoder.yaml").write_text(content)
    assert load_tile_encoder_spec(str(tmp_path / "my-encoder.yaml")).dim == 384
    assert create_tile_encoder(str(tmp_path / "my-encoder.yaml"), checkpoint="random").dim == 384


def test_the_glossary_defines_every_metric() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(METRIC_NAMES)


def test_the_page_of_questions_names_recipes_that_exist_and_its_arithmetic_is_right() -> None:
    page = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--config ([\w-]+)", page))
    assert {"binary", "survival", "gigapath"} <= named <= set(list_recipes("fit"))
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "questions.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_is_python_and_uses_names_that_exist(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "longslide":
                assert hasattr(longslide, node.attr), f"longslide.{node.attr}"


def test_the_badges_are_true() -> None:
    readme, project = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        tomllib.loads((ROOT / "pyproject.toml").read_text()),
    )
    versions = [c.split(" :: ")[-1] for c in project["project"]["classifiers"] if "Python :: 3." in c]
    badges = re.findall(r"img\.shields\.io/badge/(\w+)-(.*?)-blue", readme)
    assert dict(badges) == {
        "python": f"{versions[0]}_to_{versions[-1]}",
        "licence": project["project"]["license"].replace("-", "--"),
        "types": "mypy_strict" if project["tool"]["mypy"]["strict"] else "",
        "style": "ruff",
    }
    assert project["project"]["requires-python"] == f">={versions[0]}"
