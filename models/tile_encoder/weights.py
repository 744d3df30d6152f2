"""Weights of tile encoders: from a file, a folder or the hub, in timm's names or in other people's.

Every tensor must find its place: what is missing, left over or of the wrong shape is named in the error. Nothing is
unpickled.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import LongslideError
from ..checkpoint_file import check_tensors, digest, download, read_checkpoint
from .published_names import LEFT_OUT, to_timm
from .spec import TileEncoderSpec

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

_WRAPPERS = ("model", "state_dict", "model_state_dict", "teacher", "student")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "vit.", "dinov2.", "dinov2_with_registers.")


def load_weights(network: nn.Module, spec: TileEncoderSpec, checkpoint: Path | None) -> str:
    """Load weights into a network.

    Args:
        network: A timm model, or one whose method `from_published` finds its tensors in those of the file; on any device
            (the meta device too).
        spec: Its facts.
        checkpoint: A weights file, or a folder as the hub lays it out; None takes the published weights from the hub.

    Returns:
        The source of the weights and the first 16 hex digits of the SHA-256 of the file.

    Raises:
        LongslideError: If the weights are unavailable or do not fit.
    """
    names = (spec.hub_file,) if spec.hub_file else _WEIGHT_FILES
    if checkpoint is None:
        what = f"Tile encoder {spec.name!r}"
        if spec.hub_id is None and spec.weights_page:
            raise LongslideError(
                f"{what}: get its weights from {spec.weights_page} and give them with --tile-checkpoint"
            )
        file, source = download(what, spec.hub_id, names, gated=spec.gated, option="--tile-checkpoint")
    else:
        file = _find(checkpoint, names)
        source = str(file)
    state = _strip_prefixes(_unwrap(read_checkpoint(file), file))
    from_published = getattr(network, "from_published", None)
    state = from_published(state) if from_published else to_timm(state, network)
    what = f"{source}: does not fit tile encoder {spec.name!r} ({spec.architecture})"
    check_tensors(state, network.state_dict(), what)
    network.load_state_dict(state, strict=True, assign=True)
    return f"{source} {digest(file)}"


def _find(checkpoint: Path, names: Sequence[str]) -> Path:
    if checkpoint.is_dir():
        for name in names:
            if (checkpoint / name).is_file():
                return checkpoint / name
        raise LongslideError(f"{checkpoint}: the folder has no {' or '.join(names)}; name the weights file itself.")
    if not checkpoint.is_file():
        raise LongslideError(f"{checkpoint}: no such checkpoint; give a file, a folder of the hub, or the word random.")
    return checkpoint


def _unwrap(content: Any, file: Path) -> dict[str, Tensor]:
    while isinstance(content, dict) and not all(isinstance(value, Tensor) for value in content.values()):
        inside = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        if len(inside) != 1:
            what = f"several state dicts ({', '.join(inside)})" if inside else "no state dict"
            raise LongslideError(
                f"{file}: holds {what} among {', '.join(map(str, content))[:200]}; save the one to load."
            )
        content = content[inside[0]]
    if not isinstance(content, dict) or not content:
        raise LongslideError(f"{file}: holds no tensors by name; save a state dict.")
    return content


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off wrappers' prefixes that all tensors of the network share."""
    while True:
        network = [key for key in state if not re.fullmatch(LEFT_OUT, key)]
        shared = [prefix for prefix in _PREFIXES if network and all(key.startswith(prefix) for key in network)]
        if not shared:
            return state
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
