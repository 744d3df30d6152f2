"""What is chosen for embedding: the tiles, the tile encoder, the slide encoder; looked at before anything is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...data.slides.base import READERS
from ...data.tissue.base import TissueSegmenter
from ...data.tissue.optical_density import OpticalDensity
from ...errors import LongslideError
from ...ranges import check_options
from ...registry import is_factory
from .layout import Tiling

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import nn

    from ...models.slide_encoder.base import AnySlideEncoder
    from ...models.tile_encoder.spec import TileEncoderSpec

    TileEncoderChoice: TypeAlias = str | Path | nn.Module
    SlideEncoderChoice: TypeAlias = str | Path | AnySlideEncoder
else:  # what the command line takes, without torch
    TileEncoderChoice = SlideEncoderChoice = str | Path

DEFAULT_TILE_MPP = 0.5
"""Microns per pixel of the tiles where the encoder recommends none: 20x."""

DEFAULT_TILE_PX = 256
"""Edge of the tiles where no encoder is named."""


def resolve_tiling(
    spec: "TileEncoderSpec | None",
    tile_mpp: float | None,
    tile_px: int | None,
    overlap: int,
    min_tissue: float,
    tissue: TissueSegmenter | None,
    reader: str | None,
) -> Tiling:
    """Which tiles are taken: as asked for, else as the tile encoder recommends.

    Raises:
        LongslideError: Values that cannot be meant, a reader that is not there, or a segmenter that cannot run.
    """
    if tile_mpp is None:
        tile_mpp = (spec.tile_mpp if spec else None) or DEFAULT_TILE_MPP
    if tile_px is None:
        tile_px = spec.tile_px if spec else DEFAULT_TILE_PX
    check_options({"tile_mpp": tile_mpp, "tile_px": tile_px, "overlap": overlap, "min_tissue": min_tissue})
    if overlap >= tile_px:
        raise LongslideError(f"--overlap {overlap} must be less than --tile-px {tile_px}")
    if reader is not None:
        reader = READERS.name_of(READERS.get(reader))
    tissue = tissue or OpticalDensity()
    tissue.check()
    return Tiling(tile_mpp, tile_px, overlap, min_tissue, tissue, reader)


def look_at_tile_encoder(
    choice: TileEncoderChoice, checkpoint: str | Path | None, seed: int
) -> "tuple[TileEncoderSpec, TileEncoderChoice, str | Path | None]":
    """The facts of a tile encoder, and what `create_tile_encoder` makes it of.

    Of a name or a file the facts are read without torch; a factory or a module must be made a tile encoder to know them.
    """
    if isinstance(choice, str | Path) and not is_factory(choice):
        from ...models.tile_encoder.spec import load_tile_encoder_spec

        return load_tile_encoder_spec(choice), choice, checkpoint
    from ...models.tile_encoder.encoder import create_tile_encoder

    encoder = create_tile_encoder(choice, checkpoint=checkpoint, seed=seed)
    return encoder.spec, encoder, None


def check_slide_encoder(
    name: SlideEncoderChoice, checkpoint: str | Path | None, tile_encoder: str, trust_remote_code: bool = False
) -> None:
    """Published slide encoders read the embeddings of one tile encoder; those of another may have the same length.

    A factory, an encoder and a checkpoint of masked autoencoding say only when they are loaded what they read.

    Raises:
        LongslideError: There is no such slide encoder, its published weights read those of another tile encoder, or it
            brings code of its own that was not said to be trusted.
    """
    from ...models.slide_encoder.spec import SlideEncoderSpec, is_remote, load_slide_encoder_spec, reads_any, trusted

    if not isinstance(name, str | Path) or is_factory(name) or Path(checkpoint or "").suffix == ".ckpt":
        return
    if is_remote(name):
        trusted(name, trust_remote_code)
        return
    spec = load_slide_encoder_spec(name)
    if not reads_any(spec, checkpoint) and spec.tile_encoder != tile_encoder:
        own = ", or weights of your own with --slide-checkpoint" if isinstance(spec, SlideEncoderSpec) else ""
        raise LongslideError(
            f"the published weights of slide encoder {name!r} read tile embeddings of {spec.tile_encoder!r}, not "
            f"of {tile_encoder!r}; use that tile encoder{own}"
        )
