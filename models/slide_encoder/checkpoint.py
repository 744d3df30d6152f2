"""The published slide-encoder checkpoints: a table of names, theirs -> ours, used in both directions."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ..checkpoint_file import check_tensors, read_checkpoint

_TABLE = {
    "cls_token": "cls_token",
    "patch_embed.proj": "tile_projection",
    "encoder.layers.{i}.self_attn_layer_norm": "layers.{i}.attention_norm",
    "encoder.layers.{i}.self_attn.q_proj": "layers.{i}.qkv[0]",
    "encoder.layers.{i}.self_attn.k_proj": "layers.{i}.qkv[1]",
    "encoder.layers.{i}.self_attn.v_proj": "layers.{i}.qkv[2]",
    "encoder.layers.{i}.self_attn.inner_attn_ln": "layers.{i}.attention_inner_norm",
    "encoder.layers.{i}.self_attn.out_proj": "layers.{i}.attention_out",
    "encoder.layers.{i}.final_layer_norm": "layers.{i}.ffn_norm",
    "encoder.layers.{i}.ffn.fc1": "layers.{i}.ffn_in",
    "encoder.layers.{i}.ffn.ffn_layernorm": "layers.{i}.ffn_inner_norm",
    "encoder.layers.{i}.ffn.fc2": "layers.{i}.ffn_out",
    "encoder.layer_norm": "layers_norm",
    "norm": "norm",
}
"""Stems of the tensor names; `[n]` is the n-th third of our tensor's rows."""

_LEFT_OUT = ("pos_embed",)
"""The table of positions that some versions saved: computed here."""


def load_published(encoder: nn.Module, file: Path, what: str) -> None:
    """Load a checkpoint as published, `{"model": state_dict}`, or a bare state dict of the same names.

    Args:
        encoder: The encoder, on any device (the meta device too).
        file: A torch or safetensors file.
        what: What to say before the names of the tensors that do not fit.

    Raises:
        LongslideError: The file is broken, or tensors are missing, unexpected or of the wrong shape.
    """
    content = read_checkpoint(file)
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise LongslideError(f"{file}: not a slide-encoder checkpoint: expected a state dict, or one under `model`")
    state = {key: value for key, value in state.items() if key not in _LEFT_OUT}
    names = _names(encoder)
    wanted = to_published(encoder)
    check_tensors(state, wanted, what)
    ours: dict[str, list[Tensor]] = {}
    for theirs, (name, _) in names.items():
        ours.setdefault(name, []).append(state[theirs])
    merged = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in ours.items()}
    encoder.load_state_dict(merged, strict=True, assign=True)


def to_published(encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's weights under their published names; `torch.save({"model": ...}, file)` writes the published format."""
    state = encoder.state_dict()
    published = {}
    for theirs, (ours, third) in _names(encoder).items():
        published[theirs] = state[ours] if third is None else state[ours].chunk(3)[third]
    return published


def _names(encoder: nn.Module) -> dict[str, tuple[str, int | None]]:
    """Published name -> (our name, which third of it or None for all), q before k before v."""
    ours = set(encoder.state_dict())
    layers = 1 + max((int(match[1]) for name in ours if (match := re.match(r"layers\.(\d+)\.", name))), default=-1)
    names: dict[str, tuple[str, int | None]] = {}
    for theirs, our in _TABLE.items():
        stem, third = (our[:-3], int(our[-2])) if our.endswith("]") else (our, None)
        for i in range(layers if "{i}" in theirs else 1):
            for suffix in ("", ".weight", ".bias"):
                name = stem.replace("{i}", str(i)) + suffix
                if name in ours:
                    names[theirs.replace("{i}", str(i)) + suffix] = (name, third)
    return names
