"""The image tower of KEEP (https://doi.org/10.1016/j.ccell.2026.01.019): a ViT-L/16 and a head into the space of texts."""

from typing import Any

import timm
from torch import Tensor, nn


class Keep(nn.Module):
    """KEEP's image tower, in the names of the published checkpoint.

    Args:
        dim: Length of the embedding.
        **visual_args: Further arguments of timm's ViT.
    """

    def __init__(self, dim: int = 768, **visual_args: Any) -> None:
        super().__init__()
        self.visual = timm.create_model("vit_large_patch16_224", init_values=1e-5, num_classes=0, **visual_args)
        self.visual_head = nn.Sequential(nn.Linear(1024, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, 224, 224)` normalised images to `(B, dim)` embeddings of length 1."""
        out: Tensor = nn.functional.normalize(self.visual_head(self.visual(images)), dim=-1)
        return out

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of this tower out of `model.safetensors`, which holds texts too and calls a layer scale `weight`."""
        names = {key: key.replace(".ls1.weight", ".ls1.gamma").replace(".ls2.weight", ".ls2.gamma") for key in state}
        return {names[key]: value for key, value in state.items() if key.startswith(("visual.", "visual_head."))}
