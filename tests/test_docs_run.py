"""Every block of README and docs is run, parsed or compared; one that is not says why."""

import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import longslide
import numpy as np
import pandas as pd
import pytest
import yaml
from longslide.models.tile_encoder.encoder import create_tile_encoder
from longslide.pipeline.cli import main, parse
from longslide.pipeline.embed.waits import Waits
from small_encoders import save_weights, use_small_encoders

ROOT = Path(__file__).parent.parent
OWN_TEST = {"walkthrough.md", "notebook-embed.md", "notebook-train.md", "notebook-explain.md"}
"""Pages that `test_walkthrough.py` and `test_notebooks.py` run."""
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

REASONS = {"needs a GPU", "needs a cluster", "needs the network", "needs optional packages", "takes minutes"}

BRIEF = ["--epochs", "1", "--min-steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SMALL = {
    "fit": [*BRIEF, "--data.workers", "0"],
    "crossval": [*BRIEF, "--data.workers", "0"],
    "sweep": [*BRIEF, "--data.workers", "0", "--folds", "2", "--inner-folds", "2"],
    "pretrain": [*BRIEF, "--data.workers", "0"],
}
"""What a command is given besides, so that it takes a second."""


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    not_run: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(
        r"^(?:<!-- not run: (.*?) -->\n)?```(\w*)\n(.*?)^```$",
        page.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return [Block(kind, text, reason) for reason, kind, text in found]


def test_few_blocks_are_not_run_and_they_say_why() -> None:
    marked = [block for page in [ROOT / "README.md", *PAGES] for block in blocks(page) if block.not_run]
    assert {block.not_run for block in marked} == REASONS
    assert {block.kind for block in marked} == {"bash"}, "their options are looked at in test_docs.py"
    assert len(marked) <= 10


def test_pages_with_a_test_of_their_own_have_nothing_that_it_does_not_run() -> None:
    for name in OWN_TEST:
        assert {(block.kind, block.not_run) for block in blocks(ROOT / "docs" / name)} == {("python", "")}


def run_words(words: list[str], page: Path) -> None:
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words[2:]:
            assert (match := re.fullmatch(r"longslide\[([\w-]+)\]", word)), f"{page.name}: {shlex.join(words)}"
            assert match[1] in extras, word
        return
    assert words[0] == "longslide", f"{page.name}: {shlex.join(words)} is not run; mark it"

    status = main([*words[1:], *SMALL.get(words[1], [])])
    assert status == 0, f"{page.name}: {shlex.join(words)} ended with status {status}"


def parse_yaml(text: str, page: Path) -> None:
    """As its first key says: a tile encoder, or the configuration of a command."""
    content: dict[str, Any] = yaml.safe_load(text)
    file = Path("block.yaml")
    file.write_text(text)
    if "name" in content:
        assert create_tile_encoder(str(file), checkpoint="random").dim == content["dim"]
        return
    command = {"grid": "sweep", "model": "fit", "tissue": "embed"}[next(iter(content))]
    words = ["a.svs", "--output", "o"] if command == "embed" else ["--data.table", "cohort.csv", "--data.features", "."]
    options = parse(command, ["--config", str(file), *words])
    for key in content:
        assert options[key], f"{page.name}: {key}"


def run_page(page: Path, names: dict[str, Any]) -> None:
    """Run the blocks of a page one after the other, in the current folder."""
    listings = []
    for block in blocks(page):
        if module := re.match(r"# (\w+\.py)\n", block.text):
            Path(module[1]).write_text(block.text)
    for number, block in enumerate(blocks(page)):
        if block.not_run or re.match(r"# \w+\.py\n", block.text):
            continue
        if block.kind == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    run_words(words, page)
        elif block.kind == "yaml":
            parse_yaml(block.text, page)
        elif block.kind == "python":
            exec(compile(block.text, f"{page.name}, block {number}", "exec"), names)
        elif block.kind == "toml":
            tomllib.loads(block.text)
        else:
            assert block.kind == "text", f"{page.name}, block {number}: what kind of block is it?"
            listings.append(block.text)
    for text in listings:
        compare_output(text, page)


def compare_output(text: str, page: Path) -> None:
    """What a block states as output: a line of `embed`, the files of a folder, the modules of the package."""
    if text.startswith("time: "):
        waits = Waits()
        waits.seconds.update(encoder=97, tiles=2, slides=0.4, writing=0.4)
        assert text.strip() == str(waits)
    elif text.startswith("__init__.py"):
        words = set(re.findall(r"\w+", text))
        for folder in re.findall(r"^(?:\w+/)? +(\w+)/  ", text, re.MULTILINE):
            rooms = [path for top in ("data", "models", "pipeline") if (path := ROOT / top / folder).is_dir()]
            assert rooms, folder
            modules = {module.stem.removesuffix("_fused") for room in rooms for module in room.glob("[a-z]*.py")}
            assert modules <= words, (folder, modules - words)
    else:
        compare_folder(text, page)


def compare_folder(text: str, page: Path) -> None:
    """A listing of a folder names all files that commands have left there, and no others."""
    head, *lines = text.splitlines()
    folders = [path for path in Path().glob(head.split("/")[0] + "*" * (head != "runs/<name>/")) if path.is_dir()]
    if head == "runs/<name>/":
        folders = [path for path in Path("runs").iterdir() if path.is_dir()]
    named = [
        name for line in lines if line[2] != " " for name in re.split(r"  ", line[2:])[0].split(", ") if name != "..."
    ]
    patterns = {re.sub(r"<\w+>", "*", re.sub(r"\d+", "*", name)) for name in named}
    found = {path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()}
    for pattern in patterns:
        assert any(matches(path, pattern) for path in found), f"{page.name}: there is no {head}{pattern}"
    unnamed = [path for path in found if not any(matches(path, pattern) for pattern in patterns)]
    assert not unnamed, f"{page.name}: {head} does not name {', '.join(unnamed[:9])}"


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern names a file, or a folder that it is in."""
    return fnmatch(path, pattern + "*" * pattern.endswith("/")) and (
        path.count("/") == pattern.count("/") or pattern.endswith("/")
    )


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the slides and tables that the documentation speaks of, in which README.md was run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        use_small_encoders(patch, folder / "small")
        import uvicorn

        async def leave(_: object) -> None:
            """Instead of serving until Ctrl-C."""

        patch.setattr(uvicorn.Server, "main_loop", leave)
        fit = longslide.fit
        brief = {"epochs": 1, "min_steps": 1, "trainer": {"accelerator": "cpu", "enable_progress_bar": False}}
        patch.setattr(longslide, "fit", lambda *args, **options: fit(*args, **options | brief))
        draw("slides", [f"{letter}" for letter in "abcdefghijklmnopqr"])
        draw("new_slides", ["new"])
        shutil.copy("new_slides/new.svs", "new.svs")
        draw("external", ["u", "v", "w", "x", "y", "z"])
        shutil.copy("slides/a.svs", "a.svs")
        table("cohort.csv", "slides")
        table("external.csv", "external")
        save_weights("Slide", "gigapath", Path("slide_encoder.pth"))
        assert (
            main(
                [
                    "embed",
                    "external",
                    "--output",
                    "external_features",
                    "--tile-encoder",
                    "gigapath",
                    "--slide-encoder",
                    "gigapath",
                ]
            )
            == 0
        )
        run_page(ROOT / "README.md", {})
        prepare()
        yield folder


def draw(folder: str, names: list[str]) -> None:
    Path(folder).mkdir()
    for number, name in enumerate(names):
        texture = ("glandular", "solid")[number % 2]
        longslide.write_synthetic_slide(f"{folder}/{name}.svs", size=(640, 640), texture=texture, seed=ord(name[0]))


def table(file: str, folder: str) -> None:
    slides = sorted(Path(folder).glob("*.svs"))
    rows = [(str(s), s.stem, f"P-{s.stem}", ("glandular", "solid")[n % 2]) for n, s in enumerate(slides)]
    pd.DataFrame(rows, columns=["slide", "slide_id", "patient_id", "label"]).to_csv(file, index=False)


def prepare() -> None:
    """What pages speak of that no page makes."""
    Path("job.yaml").write_text("tile_encoder: kaiko-vits8\n")
    cohort = pd.read_csv("cohort.csv")
    cohort.rename(columns={"label": "subtype"})[["slide_id", "patient_id", "subtype"]].to_csv("labels.csv", index=False)
    for name in ("site_a/1", "site_b/1"):
        (Path("sites") / name).parent.mkdir(parents=True)
        shutil.copy(f"slides/{name[5]}.svs", f"sites/{name}.svs")
    shutil.copytree("features", "trident/features_gigapath", ignore=shutil.ignore_patterns("*.csv", "qc"))
    shutil.copy("features/a.h5", "trident/a.h5")
    explained = ["--output", "results-external/", "--explain", "integrated-gradients"]
    assert main(["predict", "external.csv", "--checkpoint", "runs/longnet", *explained]) == 0
    Path("results/regions").mkdir()
    square = {"type": "Polygon", "coordinates": [[[0, 0], [600, 0], [600, 600], [0, 600], [0, 0]]]}
    Path("results/regions/square.geojson").write_text(json.dumps(square))
    slides = [f"../../{slide}" for slide in cohort["slide"]]
    drawn = pd.DataFrame({"slide": slides, "slide_id": cohort["slide_id"], "tissue_mask": "square.geojson"})
    drawn.to_csv("results/regions/slides.csv", index=False)
    save_weights("Slide", "chief", Path("CHIEF_pretraining.pth"))
    for encoder, folder in (("chief-ctranspath", "features-chief"), ("uni", "features-uni")):
        words = ["--tile-encoder", encoder, "--tile-checkpoint", "random"]
        assert main(["embed", "slides", "--output", folder, *words]) == 0
    longslide.TileIndex.open("features/")
    assert main(["embed", "slides", "--output", "features-uni", *words, "--shard", "1/1"]) == 0
    assert main(["pretrain", "--config", "mae", "--data.features", "features-uni2/", *SMALL["pretrain"]]) == 0
    with longslide.open_slide("a.svs") as slide:
        np.save("slide.npy", slide.read_region(0, 0, 0, 640, 640))
    shutil.copytree("small/hub/prov-gigapath/prov-gigapath", "gigapath")


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(readme: Path) -> None:
    assert (readme / "results" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OWN_TEST], ids=lambda page: page.name)
def test_every_block_of_a_page_runs_in_the_folder_of_the_readme(
    page: Path, readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(readme, folder, ignore=shutil.ignore_patterns("small"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    run_page(page, PRELUDES.get(page.name, dict)())
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


PRELUDES: dict[str, Any] = {}
