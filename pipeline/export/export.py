"""`longslide export`: a slide encoder as they are published, or feature files in the layout of another tool."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import track

from ...data.features.feature_file import read_features
from ...data.features.features import Features
from ...errors import LongslideError
from ...ranges import checked
from ..batch.ledger import make_output_folder
from ..embed.slide_embedding import find_feature_files
from .layouts import WRITERS, Target
from .slide_encoder import ExportedEncoder, export_slide_encoder
from .spatial import SPATIAL_WRITERS, Thumbnail, read_scores, read_thumbnail


@dataclass(frozen=True)
class ExportedFeatures:
    """What `export` wrote of a feature file.

    Attributes:
        source: The feature file.
        files: The files, or the folder, that were written; empty if it could not be exported.
        problem: Why it could not; empty if it could.
    """

    source: Path
    files: tuple[Path, ...] = ()
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was exported."""
        return not self.problem


@checked
def export(
    checkpoint: str | Path | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    features: str | Path | list[str | Path] | None = None,
    to: Target | None = None,
    encoder: str | None = None,
    scores: str | Path | None = None,
) -> "list[ExportedEncoder] | list[ExportedFeatures]":
    """Write a trained slide encoder in the layout in which they are published, or feature files in that of another tool.

    A slide encoder is `{"model": state_dict}`; beside it goes a YAML file of its size, so that `embed` takes the two with
    --slide-encoder and --slide-checkpoint.

    Args:
        checkpoint: A checkpoint of `longslide fit`: of the masked autoencoder, or of a classifier with a slide encoder.
        output: The weights file to write, such as `slide_encoder.pth` (the YAML file has the same name with `.yaml`); for
            features a folder.
        name: The slide encoder's name, recorded in feature files. Default: the stem of `output`.
        features: Feature files, or folders of them, of any layout that `read_features` takes.
        to: Layout to write: `trident`, `clam`, `stamp`, `anndata` or `spatialdata`.
        encoder: Which tile encoder's features to take from AtlasPatch files that hold several.
        scores: The folder of `predict --explain`, whose scores of the tiles go into `anndata` and `spatialdata`.

    Returns:
        What was written: of a checkpoint, or of each feature file.

    Raises:
        LongslideError: Wrong usage, such as the features' own folder as output; no slide encoder in the checkpoint; or the
            files cannot be written.
    """
    if (checkpoint is None) == (features is None):
        raise LongslideError(
            "export takes one of --checkpoint (its slide encoder) and --features (for --to another tool)"
        )
    if output is None:
        raise LongslideError("export needs --output: the weights file, or the folder of the features")
    if checkpoint is not None:
        if to is not None or encoder is not None or scores is not None:
            raise LongslideError("--to, --encoder and --scores go with --features, not with --checkpoint")
        return [export_slide_encoder(Path(checkpoint), Path(output), name)]
    if to is None:
        raise LongslideError(f"--features needs --to: {', '.join(get_args(Target))}")
    if scores is not None and to not in SPATIAL_WRITERS:
        raise LongslideError(f"--scores goes with --to {' or '.join(SPATIAL_WRITERS)}; {to} has no place for scores")
    if scores is not None and not (Path(scores) / "slides").is_dir():
        raise LongslideError(f"{scores}: no results of `predict --explain`, which have a folder `slides`")
    if name is not None:
        raise LongslideError("--name is that of a slide encoder: it goes with --checkpoint")
    assert features is not None
    files = find_feature_files(features)
    if any(path.parent.resolve() == Path(output).resolve() for path in files):
        raise LongslideError(
            f"{output}: the folder of the features, which files of another layout would replace; choose another --output"
        )
    make_output_folder(Path(output))
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    done: list[ExportedFeatures] = []
    for path in track(files, f"exporting to {to}", console=console, transient=True, disable=not console.is_terminal):
        try:
            content = read_features(path, encoder=encoder)
            if to == "anndata" or to == "spatialdata":
                of_tiles = None if scores is None else read_scores(Path(scores), content)
                written = [SPATIAL_WRITERS[to](content, Path(output), of_tiles, _picture(content, console))]
            else:
                written = WRITERS[to](content, Path(output))
            done.append(ExportedFeatures(path, tuple(written)))
        except LongslideError as error:
            done.append(ExportedFeatures(path, problem=str(error)))
            console.print(f"failed  {path.stem}  {error}", markup=False)
    print(f"{sum(one.ok for one in done)} of {len(done)} feature files exported to {output} for {to}")
    return done


def _picture(features: Features, console: Console) -> Thumbnail | None:
    """A picture of the slide; None, with a word, where it cannot be had."""
    try:
        return read_thumbnail(features)
    except LongslideError as error:
        console.print(f"{features.slide_id}: without a picture: {error}", markup=False)
        return None
