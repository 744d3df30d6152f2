"""Published networks that segment tissue and artefacts: their architectures, checkpoint layouts and preprocessing."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LongslideError
from .checkpoint_file import check_tensors, digest, download, read_checkpoint

_HUB_ID = "MahmoodLab/hest-tissue-seg"  # all three are there, under their first publishers' names
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_loading = threading.Lock()

PATCH_PX = 512
"""Edge of the patches that all of them were trained on."""


@dataclass(frozen=True)
class TissueNetwork:
    """What is published of a network.

    Attributes:
        name: Its name.
        build: Makes the network, without weights: `(B, 3, 512, 512)` to logits `(B, classes, 512, 512)`.
        file: The file of its weights on the hub.
        mpp: Microns per pixel it was trained at.
        classes: What the classes are, by their index.
        jpeg_quality: Quality of the JPEG that its training pictures were, which its input is made too; None for none.
        half: Whether it may run in float16 on a GPU.
        prefix: What stands before the names of the tensors in the file.
        left_out: Beginnings of names of tensors in the file that are not needed.
    """

    name: str
    build: Callable[[], nn.Module]
    file: str
    mpp: float
    classes: tuple[str, ...]
    jpeg_quality: int | None = None
    half: bool = True
    prefix: str = ""
    left_out: tuple[str, ...] = ()

    def find(self, checkpoint: str | None, option: str) -> tuple[Path, str]:
        """The file of its weights, and what feature files say of it: the name and digest.

        Args:
            checkpoint: The file; None takes it from the hub.
            option: The command line's option for it, for the messages.

        Raises:
            LongslideError: There is none, or it is unavailable.
        """
        if checkpoint is None:
            file, _ = download(f"tissue network {self.name}", _HUB_ID, (self.file,), gated=False, option=option)
        else:
            file = Path(checkpoint)
            if not file.is_file():
                raise LongslideError(f"{file}: no such checkpoint; give the file {self.file} with {option}")
        return file, f"{self.name} {_digest(file, file.stat().st_mtime_ns)}"

    def load(self, file: Path, device: torch.device) -> nn.Module:
        """The network with its weights, ready to predict; it stays in memory.

        Raises:
            LongslideError: The file is broken or does not fit.
        """
        with _loading:
            return _load(self, file, file.stat().st_mtime_ns, device)


@torch.inference_mode()
def classes_of(network: TissueNetwork, model: nn.Module, patches: np.ndarray, threshold: float | None) -> np.ndarray:
    """The class of each pixel.

    Args:
        network: What is published of it.
        model: The network with its weights.
        patches: `(B, 512, 512, 3)` uint8 RGB, at its microns per pixel.
        threshold: Of two classes the second is taken where its probability is above this; None takes the more probable.

    Returns:
        `(B, 512, 512)` uint8 index of `network.classes`.
    """
    if network.jpeg_quality is not None:
        patches = np.stack([_as_jpeg(patch, network.jpeg_quality) for patch in patches])
    device = next(model.parameters()).device
    images = torch.from_numpy(patches).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (_MEAN, _STD))
    with torch.autocast(device.type, torch.float16, enabled=network.half and device.type == "cuda"):
        logits = model((images - mean) / std)
    if isinstance(logits, dict):
        logits = logits["out"]
    probabilities: Tensor = logits.float().softmax(1)
    found = probabilities.argmax(1) if threshold is None else (probabilities[:, 1] > threshold)
    return np.asarray(found.to(torch.uint8).cpu().numpy())


def _deeplab() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    network = deeplabv3_resnet50(weights=None, weights_backbone=None)
    network.classifier[4] = nn.Conv2d(256, 2, kernel_size=1)
    return cast(nn.Module, network)


def _segmentation_model(architecture: str, classes: int) -> nn.Module:
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        raise LongslideError(
            "GrandQC's networks need the package segmentation-models-pytorch: pip install 'longslide[grandqc]'"
        ) from error
    network: nn.Module = getattr(smp, architecture)("timm-efficientnet-b0", encoder_weights=None, classes=classes)
    return network


HEST = TissueNetwork(
    "hest-deeplabv3",
    _deeplab,
    "deeplabv3_seg_v4.ckpt",
    1.0,
    ("background", "tissue"),
    prefix="model.",
    left_out=("aux_classifier.",),
)
"""DeepLabV3 of HEST-1k (Jaume et al., 2024)."""

GRANDQC_TISSUE = TissueNetwork(
    "grandqc-tissue",
    lambda: _segmentation_model("UnetPlusPlus", 2),
    "Tissue_Detection_MPP10.pth",
    10.0,
    ("tissue", "background"),
    jpeg_quality=80,
)
"""UNet++ of GrandQC (Weng et al., 2024) for tissue."""

GRANDQC_ARTEFACTS = TissueNetwork(
    "grandqc-artefacts",
    lambda: _segmentation_model("Unet", 8),
    "GrandQC_MPP1_state_dict.pth",
    1.0,
    ("", "tissue", "fold", "dark spot", "pen", "air bubble or edge", "out of focus", "background"),
    half=False,
)
"""U-Net of GrandQC for artefacts; the first class does not occur."""


@lru_cache(maxsize=8)
def _digest(file: Path, modified: int) -> str:
    return digest(file)


@lru_cache(maxsize=4)
def _load(network: TissueNetwork, file: Path, modified: int, device: torch.device) -> nn.Module:
    content: Any = read_checkpoint(file)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise LongslideError(f"{file}: holds no tensors by name; save a state dict")
    state = {name.removeprefix(network.prefix): tensor for name, tensor in content.items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(network.left_out or "\0")}
    model = network.build()
    wanted = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith(network.left_out or "\0")
    }
    check_tensors(state, wanted, f"{file}: does not fit {network.name} ({network.file})")
    model.load_state_dict(state, strict=not network.left_out)
    return model.to(device).eval().requires_grad_(False)


def _as_jpeg(patch: np.ndarray, quality: int) -> np.ndarray:
    """A patch as JPEG has it; red and blue change places in it, as they did in training."""
    _, content = cv2.imencode(".jpg", patch, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR))
