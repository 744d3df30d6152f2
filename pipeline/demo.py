"""The demo: the whole job on synthetic slides, with no network and no GPU."""

import csv
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from ..data.cohort.options import DataOptions
from ..data.synthetic import TEXTURES, Texture, write_synthetic_slide
from ..data.whole_file import whole_path
from ..models.aggregators.registry import AggregatorChoice
from ..models.classifier.options import ClassifierOptions, OptimiserOptions
from ..ranges import checked
from .batch.ledger import make_output_folder
from .embed.embed import embed

ENCODERS = {
    "tile_encoder": "vit_tiny_patch16_224",
    "tile_checkpoint": "random",
    "slide_encoder": "gigapath",
    "slide_checkpoint": "random",
}
MODELS = {
    "longnet": AggregatorChoice("longnet", {"layers": 2, "width": 64, "heads": 4, "ffn_width": 128}),
    "abmil": AggregatorChoice("abmil"),
}


@checked
def demo(output: str | Path = "longslide-demo", device: str = "auto", patients: int = 24) -> list[Any]:
    """Make synthetic slides of two kinds of tissue, embed them, train on them, and predict a slide that was kept apart.

    Args:
        output: Folder for all that is made. Results that exist are kept.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.
        patients: Patients, each with one slide; at least 12.

    Returns:
        The results of the slides: those embedded and the one predicted.

    Raises:
        LongslideError: Too few patients, or the folder cannot be written to.
    """
    trainer_device = _trainer_device(device)
    console = Console(soft_wrap=True, highlight=False)
    output = Path(output)
    make_output_folder(output)
    table, features = output / "cohort.csv", output / "features"
    console.rule("Slides")
    console.print(f"{patients + 1} synthetic slides of two kinds of tissue, in {escape(str(output / 'slides'))}")
    new = _write_slides(output, patients)

    console.rule("Embed")
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in ENCODERS.items())
    _say(console, f"longslide embed {table} --output {features} {words}")
    console.print("[yellow]Both encoders have random weights: enough for such different tissues, not for real ones.[/]")
    results: list[Any] = [*embed([table], features, device=device, **ENCODERS)]  # type: ignore[arg-type]
    if not all(result.features for result in results):
        return results

    from .predict.predict import predict
    from .report.report import report
    from .train.crossval import crossval

    console.rule("Train")
    runs = [output / "runs" / model for model in MODELS]
    data = DataOptions(features, table, "binary", max_tokens=64, val_share=0.3, workers=0)
    trainer = {"max_epochs": 8, **trainer_device}
    for (name, aggregator), run in zip(MODELS.items(), runs, strict=True):
        if (run / "metrics.csv").exists():
            continue
        model = ClassifierOptions(aggregator, class_weights="balanced", optimiser=OptimiserOptions(learning_rate=1e-3))
        options = "".join(f" --model.aggregator.{key} {value}" for key, value in aggregator.init_args.items())
        _say(
            console,
            f"longslide crossval --data.table {table} --data.features {features} --data.task binary "
            "--data.max-tokens 64 --data.val-share 0.3 --data.workers 0\\\n"
            f"    --model.aggregator {name}{options}\\\n"
            "    --model.class-weights balanced --model.optimiser.learning-rate 1e-3\\\n"
            f"    --run {run} --folds 3 --monitor val_loss "
            + " ".join(f"--trainer.{option.replace('_', '-')} {value}" for option, value in trainer.items()),
        )
        crossval(data, model, folds=3, run=run, trainer=trainer, monitor="val_loss")

    console.rule("Predict")
    method: Literal["integrated-gradients"] = "integrated-gradients"
    _say(console, f"longslide predict {new} --checkpoint {runs[0]} --output {output / 'results'} --explain {method}")
    predictions = predict(new, str(runs[0]), output / "results", explain=method, device=device)
    pages = report([output / "results"])

    console.rule("What there is now")
    example = results[0].features
    console.print(
        f"""\
  {output / "slides"}  the slides: open them in QuPath, or with longslide.open_slide
  {table}  the slide table, with labels; solid-2.tif has no microns per pixel of its own, the table gives them
  {features}  one feature file per slide, read by longslide.read_features({example!r}); pictures of the tiles in qc/
{_findings(runs)}
  {predictions[0].slide_id}, which no model has seen: {predictions[0].text}
  {pages[0].path}  that prediction, and what speaks for it
  {_overlay(output / "results", predictions[0].slide_id)}  its overlay

What to do next
  longslide compare {" ".join(map(str, runs))}
  longslide doctor your-slides/
  longslide embed your-slides/ --output features/ --tile-encoder kaiko-vits8
  longslide crossval --config binary --data.table cohort.csv --data.features features/ --folds 5

Look at it in the browser (pip install 'longslide[view]')
  longslide view {output / "results"} {runs[-1]} {features} {table}""",
        markup=False,
    )
    return [*results, *predictions]


def _say(console: Console, command: str) -> None:
    console.print(f"As this command would:\n  {command}", markup=False)


def _write_slides(output: Path, patients: int) -> Path:
    """The slides of the cohort and their table; and one more slide, which is returned."""
    slides = output / "slides"
    slides.mkdir(exist_ok=True)
    rows = []
    for number in range(patients):
        texture = TEXTURES[number % 2]
        name = f"{texture}-{number // 2 + 1}.svs"
        mpp: float | None = 0.25 if number == 2 else 0.5
        table_mpp = None
        if number == 3:
            name, mpp, table_mpp = "solid-2.tif", None, 0.5
        _write_slide(slides / name, texture, mpp, number)
        rows.append([f"slides/{name}", Path(name).stem, f"patient-{number + 1}", texture, table_mpp or ""])
    with (output / "cohort.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["slide", "slide_id", "patient_id", "label", "slide_mpp"], *rows])
    (output / "new").mkdir(exist_ok=True)
    return _write_slide(output / "new" / "kept-apart.svs", "solid", 0.5, patients)


def _write_slide(path: Path, texture: Texture, mpp: float | None, seed: int) -> Path:
    if not path.exists():
        size = (3072, 2304) if mpp == 0.25 else (1792, 1536)
        with whole_path(path) as unfinished:  # so that a demo that was stopped can be run again
            write_synthetic_slide(unfinished, size=size, mpp=mpp, texture=texture, seed=seed)
    return path


def _trainer_device(device: str) -> dict[str, Any]:
    """The device as Lightning's Trainer names it."""
    from .embed.tile_embedding import resolve_device

    resolved = resolve_device(device)
    devices: int | list[int] = 1 if resolved.index is None else [resolved.index]
    return {"accelerator": "cpu" if resolved.type == "cpu" else "gpu", "devices": devices}


def _findings(runs: list[Path]) -> str:
    """A line a model: its AUROC on the patients that it has not seen."""
    import pandas as pd

    lines = []
    for run in runs:
        rows = pd.read_csv(run / "metrics.csv").query("scope == 'pooled' and level == 'patient' and metric == 'auroc'")
        found = rows.iloc[0]
        lines.append(
            f"  {run / 'report.html'}  held-out AUROC of {run.name} {found['value']:.2f} "
            f"({found['low']:.2f} to {found['high']:.2f}), pooled over folds"
        )
    return "\n".join(lines)


def _overlay(results: Path, slide_id: str) -> Path:
    return next((results / "slides" / slide_id).glob("overlay*"))
