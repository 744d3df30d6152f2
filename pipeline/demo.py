"""The demo: the whole job on synthetic slides, with no network and no GPU."""

import csv
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from ..data.features import read_features
from ..data.synthetic import write_synthetic_slide
from .embed import embed
from .job import SlideResult, make_output_folder

Texture = Literal["glandular", "solid"]

# File name, tissue texture, mpp written into the file, mpp in the table.
SLIDES: tuple[tuple[str, Texture, float | None, float | None], ...] = (
    ("glandular-1.svs", "glandular", 0.5, None),
    ("glandular-2.svs", "glandular", 0.25, None),
    ("solid-1.svs", "solid", 0.5, None),
    ("solid-2.tif", "solid", None, 0.5),
)


def demo(output: str | Path = "longslide-demo", device: str = "auto") -> list[SlideResult]:
    """Make synthetic slides and embed them with small models of random weights.

    Args:
        output: Folder for the slides, the slide table and the features.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.

    Returns:
        One result a slide.
    """
    console = Console(soft_wrap=True, highlight=False)
    output = Path(output)
    make_output_folder(output)
    slides, features, table = output / "slides", output / "features", output / "cohort.csv"
    slides.mkdir(exist_ok=True)
    console.print(f"Writing {len(SLIDES)} synthetic slides to {escape(str(slides))}")
    for seed, (name, texture, file_mpp, _) in enumerate(SLIDES):
        if not (slides / name).exists():
            size = (6144, 4608) if file_mpp == 0.25 else (4096, 3072)
            unfinished = write_synthetic_slide(slides / f".{name}", size=size, mpp=file_mpp, texture=texture, seed=seed)
            unfinished.replace(slides / name)  # so that a demo that was stopped can be run again
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "patient_id", "mpp"])
        for patient, (name, _, _, table_mpp) in enumerate(SLIDES):
            writer.writerow([f"slides/{name}", f"patient-{patient + 1}", "" if table_mpp is None else table_mpp])

    command = (
        f"longslide embed {table} --output {features} --tile-encoder vit_tiny_patch16_224 --tile-checkpoint random "
        "--slide-encoder gigapath --slide-checkpoint random"
    )
    console.print(f"Embedding them, as this command would:\n  {escape(command)}")
    console.print("[yellow]Both models have random weights: the embeddings show the format, not the tissue.[/]")
    results = embed(
        slides=[table],
        output=features,
        tile_encoder="vit_tiny_patch16_224",
        tile_checkpoint="random",
        slide_encoder="gigapath",
        slide_checkpoint="random",
        device=device,
    )
    if not all(result.features for result in results):
        return results

    example = features / f"{results[0].slide_id}.h5"
    content = read_features(example)
    assert content.slide_embedding is not None
    console.print(
        f"""
What there is now
  {slides}  the slides: open them in QuPath, or with longslide.open_slide
  {table}  the slide table; solid-2.tif has no microns per pixel of its own, the table gives them
  {features}  one feature file a slide, summary.csv
  {features / "qc"}  a picture a slide: thumbnail, tissue, tiles. Look at them first.

One of the feature files, longslide.read_features({str(example)!r}):
  features {content.features.shape} {content.features.dtype}, coords {content.coords.shape} {content.coords.dtype}, \
slide_embedding {content.slide_embedding.shape} {content.slide_embedding.dtype}

What to do next, with slides of your own
  longslide doctor your-slides/
  longslide embed your-slides/ --output features/ --tile-encoder kaiko-vits8
  longslide embed your-slides/ --output features/ --tile-encoder gigapath --slide-encoder gigapath""",
        markup=False,
    )
    return results
