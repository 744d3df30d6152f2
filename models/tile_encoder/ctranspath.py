"""CTransPath (https://doi.org/10.1016/j.media.2022.102559): a Swin transformer whose patches come from convolutions."""

from typing import Any

import timm
from torch import Tensor, nn


class ConvStem(nn.Module):
    """Patches of 4 pixels by two strided convolutions instead of one linear map.

    Args:
        img_size: Edge of the image, in pixels, or height and width.
        embed_dim: Channels of a patch.
        norm_layer: Class of the norm at the end.
        **_: What timm gives to its own patch embedding.
    """

    def __init__(self, img_size: int | tuple[int, int], embed_dim: int, norm_layer: type[nn.Module], **_: Any) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_size = (4, 4)
        self.grid_size = (self.img_size[0] // 4, self.img_size[1] // 4)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        for before, after in ((3, embed_dim // 8), (embed_dim // 8, embed_dim // 4)):
            convolution = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim // 4, embed_dim, kernel_size=1))
        self.norm = norm_layer(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` images to `(B, H / 4, W / 4, embed_dim)` patches."""
        out: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return out


def ctranspath() -> nn.Module:
    """CTransPath's network, which is CHIEF's tile encoder too: `(B, 3, 224, 224)` images to `(B, 768)`."""
    network: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", embed_layer=ConvStem, num_classes=0)
    return network
