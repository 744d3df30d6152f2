"""What a slide encoder is, whoever wrote it; and those that are given by name, file, factory or as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn

from ...errors import LongslideError
from ...registry import call_factory, is_factory
from ..checkpoint_file import digest, read_description
from .encoder import SlideEncoder, create_slide_encoder
from .published import PublishedSlideEncoder, build_published
from .remote import load_remote
from .spec import PublishedSpec, SlideEncoderSpec, is_remote, load_slide_encoder_spec, reads_any


class AnySlideEncoder(Protocol):
    """A slide encoder: tile embeddings and grid cells of one slide in, its embedding out.

    A torch module is put on the device and into evaluation mode. An attribute `pool`, if there is one, is recorded too.

    Attributes:
        name: Its name, as recorded in feature files.
        weights: Source and digest of its weights: others are another slide encoder.
        tile_encoder: Name of the tile encoder whose embeddings it reads; empty if it reads those of any.
    """

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def weights(self) -> str:
        """Source and digest of its weights."""

    @property
    def tile_encoder(self) -> str:
        """The tile encoder that it reads."""

    def __call__(self, tile_features: Tensor, grid_cells: Tensor, /) -> Tensor:
        """`(1, N, D)` float32 and `(1, N, 2)` int64 (column, row) -> `(1, D_slide)`."""


def load_slide_encoder(
    choice: str | Path | AnySlideEncoder,
    *,
    checkpoint: str | Path | None = None,
    pool: Literal["mean", "cls"] = "mean",
    seed: int = 0,
    tile_encoder: str | None,
    tile_dim: int,
    trust_remote_code: bool = False,
) -> AnySlideEncoder:
    """A slide encoder with its weights, on the CPU and in evaluation mode.

    Args:
        choice: Name of one of the package, path of a YAML file, `package.module:factory`, a repository on the hub or a
            folder that hold code of their own, or the encoder itself. A factory is called with those of `checkpoint`,
            `pool`, `seed` and `tile_dim` that it takes.
        checkpoint: A weights file as published, a checkpoint of masked autoencoding (of the encoder of this name), or
            `random`. None takes the published weights, or what the factory makes by itself.
        pool: What the slide embedding is: the `mean` over the tiles, or the `cls` token.
        seed: Seed of random weights.
        tile_encoder: Name of the tile encoder that makes the features; None where it is not known.
        tile_dim: Length of its embeddings.
        trust_remote_code: Whether the code of a repository or folder may run.

    Raises:
        LongslideError: There is none, it is no slide encoder, its weights are unavailable or do not fit, or it reads the
            embeddings of another tile encoder.
    """
    any_tiles = False
    encoder: AnySlideEncoder
    if not isinstance(choice, str | Path):
        encoder = _checked(choice, "the slide encoder")
    elif is_factory(choice):
        given = {"checkpoint": checkpoint, "pool": pool, "seed": seed, "tile_dim": tile_dim}
        made = call_factory(str(choice), f"slide encoder {choice!r}", given, option="--slide-checkpoint")
        encoder = _checked(made, f"slide encoder {choice!r}")
    elif is_remote(choice):
        encoder = load_remote(choice, checkpoint=checkpoint, pool=pool, trust_remote_code=trust_remote_code)
    elif checkpoint is not None and Path(checkpoint).suffix == ".ckpt":
        encoder = read_pretrained(Path(checkpoint), pool)
        if encoder.name != str(choice):
            raise LongslideError(
                f"{checkpoint}: a checkpoint of slide encoder {encoder.name!r}, not of {str(choice)!r}; give "
                f"--slide-encoder {encoder.name}"
            )
        if encoder.spec.tile_dim != tile_dim:
            raise LongslideError(
                f"{checkpoint}: reads tile embeddings of length {encoder.spec.tile_dim}, but those of "
                f"{tile_encoder or 'the features'!r} have {tile_dim}"
            )
    else:
        spec = load_slide_encoder_spec(choice)
        any_tiles = reads_any(spec, checkpoint)
        if not any_tiles and spec.tile_dim != tile_dim:
            raise LongslideError(
                f"slide encoder {spec.name!r} reads tile embeddings of length {spec.tile_dim} (those of "
                f"{spec.tile_encoder}), not of {tile_dim}; use that tile encoder"
            )
        changes = {"tile_dim": tile_dim} if any_tiles else {}
        encoder = create_slide_encoder(choice, checkpoint=checkpoint, pool=pool, seed=seed, **changes)
    if not any_tiles and tile_encoder and encoder.tile_encoder and encoder.tile_encoder != tile_encoder:
        raise LongslideError(
            f"slide encoder {encoder.name!r} ({encoder.weights}) reads tile embeddings of {encoder.tile_encoder!r}, not of "
            f"{tile_encoder!r}; use that tile encoder"
        )
    return encoder


def read_pretrained(file: Path, pool: Literal["mean", "cls"] = "mean", **changes: Any) -> SlideEncoder:
    """The slide encoder of a masked autoencoder's checkpoint, in evaluation mode.

    Args:
        file: The checkpoint.
        pool: How it is pooled.
        **changes: Keys of `SlideEncoderSpec` that do not change its size, such as `dropout`.

    Raises:
        LongslideError: No such file, a broken one, not one of the masked autoencoder, or one of a newer Longslide.
    """
    description = read_description(file)
    if description is None or description.get("kind") != "mae":
        raise LongslideError(
            f"{file}: not a checkpoint of the masked autoencoder (`longslide pretrain`); "
            "published weights go with --model.aggregator gigapath"
        )
    encoder = from_architecture(description["slide_encoder"] | {"weights": f"{file} {digest(file)}"} | changes, pool)
    assert isinstance(encoder, SlideEncoder)  # the masked autoencoder has no other
    state = description["state_dict"]
    encoder.load_state_dict(
        {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    )
    return encoder.eval()


def from_architecture(
    architecture: Mapping[str, Any], pool: Literal["mean", "cls"]
) -> SlideEncoder | PublishedSlideEncoder:
    """The slide encoder that a checkpoint describes: the keys of its spec, and `weights`; without its weights."""
    spec = dict(architecture)
    weights = spec.pop("weights")
    if "architecture" in spec:
        return build_published(PublishedSpec(**spec), weights)
    spec["dilated_ratios"] = tuple(spec["dilated_ratios"])
    return SlideEncoder(SlideEncoderSpec(**spec), pool, weights)


def _checked(encoder: object, what: str) -> AnySlideEncoder:
    missing = [
        name for name in ("name", "weights", "tile_encoder") if not isinstance(getattr(encoder, name, None), str)
    ]
    if missing or not callable(encoder):
        raise LongslideError(
            f"{what}: {type(encoder).__name__} is no slide encoder, which has name, weights and tile_encoder as text, and "
            "a call (features (1, N, D), cells (1, N, 2)) -> (1, D_slide)"
        )
    if isinstance(encoder, nn.Module):
        encoder.eval()
    return cast(AnySlideEncoder, encoder)
