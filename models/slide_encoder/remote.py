"""Slide encoders that bring code of their own: repositories on the hub, or folders like them, run on the user's word."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ..checkpoint_file import digest_of_tensors, download
from .spec import list_slide_encoders, load_slide_encoder_spec, trusted

METHODS = ("encode_slide_from_patch_features", "slide_representations", "forward_features")
"""What is called for a slide embedding, the first that a model has: that of TITAN, of PRISM, of FEATHER and its like."""


class RemoteSlideEncoder(nn.Module):
    """A model of code that is not ours.

    Args:
        model: The model; it has one of `METHODS`.
        name: The repository, or the folder's name.
        weights: Where code and weights came from, and their digests.
        tile_encoder: The tile encoder that it reads, where that is known; else empty.
    """

    def __init__(self, model: nn.Module, name: str, weights: str, tile_encoder: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.weights = weights
        self.tile_encoder = tile_encoder

    def forward(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """`(1, N, D)` and `(1, N, 2)` integer (column, row) -> `(1, width)`.

        Raises:
            LongslideError: Its code fails, or gives something else.
        """
        method = next(method for method in METHODS if hasattr(self.model, method))
        # Cells stand for coordinates: in them a tile has an edge of 1.
        given = (tile_features, grid_cells, 1) if method == METHODS[0] else (tile_features,)
        try:
            found: Any = getattr(self.model, method)(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever foreign code does
            raise LongslideError(f"slide encoder {self.name!r}: its own {method} fails ({_reason(error)})") from error
        if isinstance(found, dict):
            found = found.get("image_embedding")
        if isinstance(found, tuple):
            found = found[0]
        if isinstance(found, Tensor) and found.ndim == 1:
            found = found[None]
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise LongslideError(
                f"slide encoder {self.name!r}: its own {method} gives {shape}, and not one embedding (1, D)"
            )
        return found


def load_remote(
    choice: str | Path, *, checkpoint: str | Path | None, pool: str, trust_remote_code: bool
) -> RemoteSlideEncoder:
    """Load a model by the code in its repository or folder, on the CPU and in evaluation mode.

    Args:
        choice: `owner/name` on the hub, with `@revision` or without, or a folder with `config.json`.
        checkpoint: Must be None: the weights are those beside the code.
        pool: Must be `mean`, the default: the pooling is its own.
        trust_remote_code: Whether the user has said that this code may run.

    Raises:
        LongslideError: It may not, transformers is not installed, or there is no such model, or none that gives slide
            embeddings.
    """
    what = f"slide encoder {str(choice)!r}"
    trusted(choice, trust_remote_code)
    if checkpoint is not None or pool != "mean":
        raise LongslideError(f"{what} has weights and a pooling of its own: leave --slide-checkpoint and --pool out")
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise LongslideError(f"{what} needs transformers: pip install 'longslide[remote-code]'") from error
    folder = Path(choice)
    repository, _, revision = str(choice).partition("@")
    if folder.is_dir():
        name, came_from, source, at = folder.resolve().name, str(choice), str(folder.resolve()), {}
    else:  # first which commit: that one is run, and recorded
        option = "--slide-encoder as a folder"
        file, came_from = download(
            f"{what[0].upper()}{what[1:]}",
            repository,
            ["config.json"],
            gated=False,
            option=option,
            revision=revision or None,
        )
        folder = file.parent
        name, source, at = repository, repository, {"revision": folder.name, "code_revision": folder.name}
    try:
        model = AutoModel.from_pretrained(source, trust_remote_code=True, **at)
    except Exception as error:  # whatever foreign code does, and a hub that is not reached
        raise LongslideError(f"{what}: cannot be loaded by its own code ({_reason(error)})") from error
    if not any(hasattr(model, method) for method in METHODS):
        raise LongslideError(
            f"{what}: {type(model).__name__} has none of {', '.join(METHODS)}; wrap it by a factory, "
            "package.module:factory"
        )
    tile_encoder = next(
        (
            spec.tile_encoder
            for spec in map(load_slide_encoder_spec, list_slide_encoders())
            if spec.hub_id == repository
        ),
        "",
    )
    model = model.float().eval()
    weights = f"{came_from} remote code {_digest_of_code(folder)} {digest_of_tensors(model)}"
    return RemoteSlideEncoder(model, name, weights, tile_encoder)


def _digest_of_code(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        total.update(f"{file.name}\n".encode() + file.read_bytes())
    return f"sha256:{total.hexdigest()[:16]}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
