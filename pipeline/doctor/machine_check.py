"""What `doctor` looks at beside the slides: the encoders' weights, the GPU and the disk."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape

from ...errors import LongslideError
from ..embed.choices import SlideEncoderChoice, TileEncoderChoice, check_slide_encoder

if TYPE_CHECKING:
    from ...models.tile_encoder.spec import TileEncoderSpec


@dataclass(frozen=True)
class EncoderCheck:
    """What `doctor` found about the tile encoder or the slide encoder.

    Attributes:
        name: The encoder's name.
        problem: Why `embed` could not use it; empty when it could.
        weights: Source and digest of its weights.
        device: Where the tile encoder would run.
        precision: In what precision.
        tiles_per_second: Tiles it embeds per second there.
    """

    name: str
    problem: str = ""
    weights: str | None = None
    device: str | None = None
    precision: str | None = None
    tiles_per_second: float | None = None

    @property
    def ok(self) -> bool:
        """Whether `embed` can use it."""
        return not self.problem


@dataclass(frozen=True)
class DiskCheck:
    """What `doctor` found about the disk.

    Attributes:
        folder: The folder on it.
        need: Bytes that the feature files of all slides need.
        free: Bytes that are free.
    """

    folder: Path
    need: int
    free: int

    @property
    def problem(self) -> str:
        """Why `embed` would fail; empty when there is room."""
        if self.need <= self.free:
            return ""
        return (
            f"{self.folder}: the feature files need {size(self.need)}, {size(self.free)} are free; make room or choose "
            "another --output"
        )

    @property
    def ok(self) -> bool:
        """Whether there is room."""
        return not self.problem


def check_tile_encoder(
    name: str, choice: TileEncoderChoice, checkpoint: str | Path | None, tile_px: int, device: str, precision: str
) -> EncoderCheck:
    """Load the weights for real, and time a few batches of noise."""
    from ...models.tile_encoder.encoder import create_tile_encoder
    from ...models.tile_encoder.engine import TileEngine
    from ..embed.tile_embedding import resolve_device, resolve_precision

    try:
        torch_device = resolve_device(device)
        encoder = create_tile_encoder(choice, checkpoint=checkpoint)
        resolved = resolve_precision(precision, encoder.spec.precision, torch_device)
        batch, batches = (64, 16) if torch_device.type == "cuda" else (2, 2)
        noise = np.random.default_rng(0).integers(0, 256, (batch, tile_px, tile_px, 3), np.uint8)
        engine = TileEngine(encoder, torch_device, resolved)
        for _ in range(2):  # first compiled, and kernels chosen
            started = time.perf_counter()
            for _ in engine.stream([noise] * batches):
                pass
    except LongslideError as error:
        return EncoderCheck(name, problem=str(error))
    speed = batch * batches / (time.perf_counter() - started)
    return EncoderCheck(name, "", encoder.weights, str(torch_device), resolved, speed)


def check_slide_encoder_weights(
    choice: SlideEncoderChoice,
    checkpoint: str | Path | None,
    tile_encoder: "TileEncoderSpec",
    trust_remote_code: bool = False,
) -> EncoderCheck:
    """Load the weights for real."""
    from ...models.slide_encoder.base import load_slide_encoder

    try:
        check_slide_encoder(choice, checkpoint, tile_encoder.name, trust_remote_code)
        encoder = load_slide_encoder(
            choice,
            checkpoint=checkpoint,
            tile_encoder=tile_encoder.name,
            tile_dim=tile_encoder.dim,
            trust_remote_code=trust_remote_code,
        )
    except LongslideError as error:
        return EncoderCheck(str(choice), problem=str(error))
    return EncoderCheck(encoder.name, weights=encoder.weights)


def check_disk(tiles: int, encoders: list[EncoderCheck], dim: int, output: Path) -> DiskCheck:
    """Whether the feature files of so many tiles have room."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    number_bytes = 4 if encoders and encoders[0].precision == "float32" else 2
    return DiskCheck(folder, tiles * (dim * number_bytes + 16), shutil.disk_usage(folder).free)


def print_machine(console: Console, encoders: list[EncoderCheck]) -> None:
    """Say what GPU there is, and how fast the encoders are."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: use --precision float16"
        console.print(
            f"GPU           {torch.cuda.device_count()} x {properties.name}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {bfloat16}"
        )
    else:
        console.print("GPU           none: encoders run on the CPU in float32, a large ViT takes seconds per tile")
    for kind, encoder in zip(("tile encoder ", "slide encoder"), encoders, strict=False):
        if encoder.ok:
            speed = ""
            if encoder.tiles_per_second:
                speed = f": {encoder.tiles_per_second:,.1f} tiles/s on {encoder.device} in {encoder.precision}"
            console.print(f"{kind} {escape(f'{encoder.name} ({encoder.weights})')}{speed}")


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
