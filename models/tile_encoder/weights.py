"""Weights of tile encoders: from a file, a folder or the hub, in timm's names or in other people's.

A checkpoint in the names of transformers (ViT, DINOv2, DINOv2 with registers) or of the DINOv2 repository is translated
to timm's names by a table, theirs -> ours. Every tensor must find its place: what is missing, left over or of the wrong
shape is named in the error. Nothing is unpickled.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ..checkpoint_file import check_tensors, digest, download, read_checkpoint
from .spec import TileEncoderSpec

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

_HF_COMMON = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.{i}.attention.attention.query": "blocks.{i}.attn.q",
    "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attn.k",
    "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attn.v",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.proj",
    "layernorm": "norm",
}
_HF_VIT = _HF_COMMON | {
    "encoder.layer.{i}.layernorm_before": "blocks.{i}.norm1",
    "encoder.layer.{i}.layernorm_after": "blocks.{i}.norm2",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.output.dense": "blocks.{i}.mlp.fc2",
}
_HF_DINOV2 = _HF_COMMON | {
    "embeddings.register_tokens": "reg_token",
    "encoder.layer.{i}.norm1": "blocks.{i}.norm1",
    "encoder.layer.{i}.norm2": "blocks.{i}.norm2",
    "encoder.layer.{i}.layer_scale1.lambda1": "blocks.{i}.ls1.gamma",
    "encoder.layer.{i}.layer_scale2.lambda1": "blocks.{i}.ls2.gamma",
    "encoder.layer.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "encoder.layer.{i}.mlp.weights_in": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.mlp.weights_out": "blocks.{i}.mlp.fc2",
}
_DINOV2 = {
    "register_tokens": "reg_token",
    "blocks.{i}.mlp.w12": "blocks.{i}.mlp.fc1",
    "blocks.{i}.mlp.w3": "blocks.{i}.mlp.fc2",
}
"""Names of the DINOv2 repository; all others are timm's."""

_LEFT_OUT = r"(embeddings\.)?mask_token|(pooler|classifier|dino_head|ibot_head|dino_loss|ibot_patch_loss)\..*"
"""Tensors that only training or classification needs: they may be in a checkpoint and are not loaded."""

_WRAPPERS = ("model", "state_dict", "model_state_dict", "teacher", "student")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "vit.", "dinov2.", "dinov2_with_registers.")


def load_weights(network: nn.Module, spec: TileEncoderSpec, checkpoint: Path | None) -> str:
    """Load weights into a timm model.

    Args:
        network: The model, on any device (the meta device too).
        spec: Its facts.
        checkpoint: A weights file, or a folder as the hub lays it out; None takes the published weights from the hub.

    Returns:
        The source of the weights and the first 16 hex digits of the SHA-256 of the file.

    Raises:
        LongslideError: If the weights are unavailable or do not fit.
    """
    if checkpoint is None:
        file, source = download(
            f"Tile encoder {spec.name!r}", spec.hub_id, _WEIGHT_FILES, gated=spec.gated, option="--tile-checkpoint"
        )
    else:
        file = _find(checkpoint)
        source = str(file)
    state = _translate(_strip_prefixes(_unwrap(read_checkpoint(file), file)), network)
    what = f"{source}: does not fit tile encoder {spec.name!r} ({spec.architecture})"
    check_tensors(state, network.state_dict(), what)
    network.load_state_dict(state, strict=True, assign=True)
    return f"{source} {digest(file)}"


def _find(checkpoint: Path) -> Path:
    if checkpoint.is_dir():
        for name in _WEIGHT_FILES:
            if (checkpoint / name).is_file():
                return checkpoint / name
        raise LongslideError(
            f"{checkpoint}: the folder has no {' or '.join(_WEIGHT_FILES)}; name the weights file itself."
        )
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
        network = [key for key in state if not re.fullmatch(_LEFT_OUT, key)]
        shared = [prefix for prefix in _PREFIXES if network and all(key.startswith(prefix) for key in network)]
        if not shared:
            return state
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}


def _translate(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Rename to timm's names, and drop the tensors that are allowed to be left out."""
    theirs = set(state)
    state = {key: value for key, value in state.items() if not re.fullmatch(_LEFT_OUT, key)}
    if "embeddings.cls_token" in theirs:
        table = _HF_VIT if any("layernorm_before" in key for key in theirs) else _HF_DINOV2
        state = _merge_qkv(_rename(state, table))
        if table is _HF_DINOV2:
            state = _resample_positions(state, network)
        return _fold_class_position(state, network)
    if theirs & {"mask_token", "register_tokens"} or any(".mlp.w12." in key for key in theirs):
        return _fold_class_position(_rename(state, _DINOV2), network)
    classifiers = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    extras = {f"{name}.{kind}" for name in classifiers for kind in ("weight", "bias")} - network.state_dict().keys()
    return {key: value for key, value in state.items() if key not in extras}


def _rename(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        stem, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", key).groups(default="")  # type: ignore[union-attr]
        layer = re.search(r"\.(\d+)\.", stem)
        pattern = stem.replace(layer[0], ".{i}.", 1) if layer else stem
        ours = table.get(pattern, pattern).replace("{i}", layer[1] if layer else "")
        renamed[ours + suffix] = value
    return renamed


def _merge_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = dict(state)
    for key in state:
        parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if ".attn.q." in key and all(part in state for part in parts):
            merged[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([merged.pop(part) for part in parts])
    return merged


def _resample_positions(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Bring the position embeddings to the network's grid, as transformers' DINOv2 does at run time.

    Bicubic in float32, and antialiased only in the model with registers: what the published embeddings were made with.
    """
    positions = state.get("pos_embed")
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if positions is None or grid is None or positions.ndim != 3:
        return state
    side = math.isqrt(positions.shape[1] - 1)
    if (side, side) == tuple(grid) or side * side != positions.shape[1] - 1:
        return state
    patches = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(
        patches, size=tuple(grid), mode="bicubic", align_corners=False, antialias="reg_token" in state
    )
    return state | {"pos_embed": torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2).to(positions)], dim=1)}


def _fold_class_position(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Where timm has no position for the class token, add theirs to the token itself."""
    if not getattr(network, "no_embed_class", False) or not {"pos_embed", "cls_token"} <= state.keys():
        return state
    positions = state["pos_embed"]
    return state | {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
