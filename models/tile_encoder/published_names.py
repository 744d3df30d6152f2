"""Names of published checkpoints, translated to timm's.

Tables, theirs -> ours, for the ViTs of transformers (ViT, DINOv2, DINOv2 with registers, CLIP), of the DINOv2 repository, of
OpenCLIP and of BEiT-3, and for Swin transformers of timm before 0.9. What only training, texts or classification need is
dropped.
"""

import math
import re

import torch
from torch import Tensor, nn

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
_HF_CLIP = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",
    "encoder.layers.{i}.layer_norm1": "blocks.{i}.norm1",
    "encoder.layers.{i}.layer_norm2": "blocks.{i}.norm2",
    "encoder.layers.{i}.self_attn.q_proj": "blocks.{i}.attn.q",
    "encoder.layers.{i}.self_attn.k_proj": "blocks.{i}.attn.k",
    "encoder.layers.{i}.self_attn.v_proj": "blocks.{i}.attn.v",
    "encoder.layers.{i}.self_attn.out_proj": "blocks.{i}.attn.proj",
    "encoder.layers.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "encoder.layers.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "post_layernorm": "norm",
}
_OPEN_CLIP = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "transformer.resblocks.{i}.ln_1": "blocks.{i}.norm1",
    "transformer.resblocks.{i}.ln_2": "blocks.{i}.norm2",
    "transformer.resblocks.{i}.attn.in_proj_weight": "blocks.{i}.attn.qkv.weight",
    "transformer.resblocks.{i}.attn.in_proj_bias": "blocks.{i}.attn.qkv.bias",
    "transformer.resblocks.{i}.attn.out_proj": "blocks.{i}.attn.proj",
    "transformer.resblocks.{i}.mlp.c_fc": "blocks.{i}.mlp.fc1",
    "transformer.resblocks.{i}.mlp.c_proj": "blocks.{i}.mlp.fc2",
    "ln_post": "norm",
}
_BEIT3 = {  # `.A` is the expert for images
    "vision_embed.cls_token": "cls_token",
    "vision_embed.proj": "patch_embed.proj",
    "encoder.embed_positions.A": "pos_embed",
    "encoder.layers.{i}.self_attn_layer_norm.A": "blocks.{i}.norm1",
    "encoder.layers.{i}.final_layer_norm.A": "blocks.{i}.norm2",
    "encoder.layers.{i}.self_attn.q_proj.A": "blocks.{i}.attn.q",
    "encoder.layers.{i}.self_attn.k_proj.A": "blocks.{i}.attn.k",
    "encoder.layers.{i}.self_attn.v_proj.A": "blocks.{i}.attn.v",
    "encoder.layers.{i}.self_attn.inner_attn_ln.A": "blocks.{i}.attn.norm",
    "encoder.layers.{i}.self_attn.out_proj.A": "blocks.{i}.attn.proj",
    "encoder.layers.{i}.ffn.A.fc1": "blocks.{i}.mlp.fc1",
    "encoder.layers.{i}.ffn.A.fc2": "blocks.{i}.mlp.fc2",
    "encoder.layers.{i}.ffn.A.ffn_layernorm": "blocks.{i}.mlp.norm",
    "encoder.layer_norm.A": "norm",
}
_DINOV2 = {
    "register_tokens": "reg_token",
    "blocks.{i}.mlp.w12": "blocks.{i}.mlp.fc1",
    "blocks.{i}.mlp.w3": "blocks.{i}.mlp.fc2",
}
"""Names of the DINOv2 repository; all others are timm's."""

LEFT_OUT = r"(embeddings\.)?mask_token|(pooler|classifier|dino_head|ibot_head|dino_loss|ibot_patch_loss)\..*"
"""Tensors that only training or classification needs: they may be in a checkpoint and are not loaded."""


def to_timm(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a published checkpoint to timm's names, and drop those that the network does not need.

    Args:
        state: Name -> tensor, without prefixes that all share.
        network: The timm model that they are for.

    Returns:
        Name -> tensor; what is no known layout stays as it is.
    """
    theirs = set(state)
    if "vision_model.embeddings.class_embedding" in theirs:
        return _clip(
            _merge_qkv(_rename(_under("vision_model.", state), _HF_CLIP)), state.get("visual_projection.weight")
        )
    if "visual.class_embedding" in theirs:
        tower = _under("visual.", state)
        projection = tower.pop("proj", None)
        return _clip(_rename(tower, _OPEN_CLIP), None if projection is None else projection.t())
    if "beit3.vision_embed.cls_token" in theirs:
        return _beit3(_under("beit3.", state))
    if "layers.0.downsample.reduction.weight" in theirs:
        return _late_downsampling(state)
    state = {key: value for key, value in state.items() if not re.fullmatch(LEFT_OUT, key)}
    if "embeddings.cls_token" in theirs:
        table = _HF_VIT if any("layernorm_before" in key for key in theirs) else _HF_DINOV2
        state = _merge_qkv(_rename(state, table))
        if table is _HF_DINOV2:
            state = _resample_positions(state, network)
        return _fold_class_position(state, network)
    if theirs & {"mask_token", "register_tokens"} or any(".mlp.w12." in key for key in theirs):
        # Trainings for several GPUs keep their blocks in chunks: blocks.<chunk>.<block>.
        state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key): value for key, value in state.items()}
        return _fold_class_position(_rename(state, _DINOV2), network)
    classifiers = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    extras = {f"{name}.{kind}" for name in classifiers for kind in ("weight", "bias")} - network.state_dict().keys()
    return {key: value for key, value in state.items() if key not in extras}


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _clip(tower: dict[str, Tensor], projection: Tensor | None) -> dict[str, Tensor]:
    """The image tower of CLIP, and its projection as timm's head, whose bias is zero."""
    tower.pop("embeddings.position_ids", None)
    positions = tower.pop("pos_embed.weight", tower.pop("pos_embed", None))
    if positions is not None:
        tower["pos_embed"] = positions[None]
    if "cls_token" in tower:
        tower["cls_token"] = tower["cls_token"].reshape(1, 1, -1)
    if projection is not None:
        tower |= {"head.weight": projection.contiguous(), "head.bias": projection.new_zeros(len(projection))}
    return tower


def _beit3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts for images; two rows of the position embeddings are fairseq's and never read."""
    experts = {
        key: value
        for key, value in state.items()
        if ".B." not in key and not key.startswith("text_embed.") and key != "vision_embed.mask_token"
    }
    tower = _merge_qkv(_rename(experts, _BEIT3))
    if "pos_embed.weight" in tower:
        tower["pos_embed"] = tower.pop("pos_embed.weight")[None, 2:]
    return tower


def _late_downsampling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Swin transformer in which a stage ends with its downsampling; since timm 0.9 the next one begins with it."""
    computed = ("relative_position_index", "attn_mask")
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda stage: f"layers.{int(stage[1]) + 1}.downsample", key): value
        for key, value in state.items()
        if not key.endswith(computed)
    }


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
