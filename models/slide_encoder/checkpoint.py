"""The published slide-encoder checkpoints: tables of names, theirs -> ours, used in both directions."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ..checkpoint_file import check_tensors, download, read_checkpoint
from .spec import SlideEncoderFacts

_UNDER = ("model", "state_dict", "teacher_slide_encoder")
"""Keys under which published files hold the state dict."""

_TEACHER = "momentum_enc."
"""What of a self-distilled model is published, among the rest of it."""

_WRAPPERS = ("module.", "model.")
"""What the modules that models were wrapped in have put before all names."""


@runtime_checkable
class Published(Protocol):
    """A module whose weights are published under other names than ours.

    Attributes:
        PUBLISHED: Stems of the tensor names, theirs -> ours; `{i}` stands for each number that our names have there, and
            `[n]` for the n-th third of our tensor's rows.
        ROOT: What the names of this part of the published model begin with; its other parts are left out.
        LEFT_OUT: Patterns of names that are not needed, unless they are among those above.
        SHARED: Patterns of names of one tensor, and the name that it has here.
    """

    PUBLISHED: Mapping[str, str]
    ROOT: str
    LEFT_OUT: tuple[str, ...]
    SHARED: Mapping[str, str]


def weights_file(spec: SlideEncoderFacts, checkpoint: str | Path | None) -> tuple[Path, str]:
    """The weights of a slide encoder: a file that was given, or the hub's.

    Returns:
        The file, and where it came from.

    Raises:
        LongslideError: There is no such file, or the hub's is unavailable.
    """
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise LongslideError(f"{checkpoint}: no such checkpoint; give a file, or the word random.")
        return Path(checkpoint), str(checkpoint)
    names = [spec.hub_file or "", *(["pytorch_model.bin"] if spec.hub_file == "model.safetensors" else [])]
    what = f"Slide encoder {spec.name!r}"
    return download(
        what, spec.hub_id, names, gated=spec.gated, option="--slide-checkpoint, or in training --model.checkpoint"
    )


def load_published(encoder: nn.Module, file: Path, what: str, *, under: str | None = None) -> None:
    """Load a checkpoint as published: a state dict, or one under `model` and the like.

    Args:
        encoder: The encoder, a `Published` one, on any device (the meta device too).
        file: A torch or safetensors file.
        what: What to say before the names of the tensors that do not fit.
        under: The key of the state dict, where a file has several.

    Raises:
        LongslideError: The file is broken, or tensors are missing, unexpected or of the wrong shape.
    """
    assert isinstance(encoder, Published)
    names = _names(encoder)
    state: dict[str, Tensor] = {}
    for key, value in _state_dict(file, _UNDER if under is None else (under,)).items():
        for pattern, name in encoder.SHARED.items():
            key = re.sub(pattern, name, key)
        left_out = any(fnmatchcase(key, pattern) for pattern in encoder.LEFT_OUT)
        if key not in names and (left_out or not key.startswith(encoder.ROOT)):
            continue
        if key in state and not torch.equal(state[key], value):
            raise LongslideError(f"{what}: two tensors {key}, which it has once")
        state[key] = value
    check_tensors(state, to_published(encoder), what)
    ours: dict[str, list[Tensor]] = {}
    for theirs, (name, _) in names.items():
        ours.setdefault(name, []).append(state[theirs])
    merged = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in ours.items()}
    encoder.load_state_dict(merged, strict=True, assign=True)


def to_published(encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's weights under their published names; `torch.save({"model": ...}, file)` writes GigaPath's format."""
    state = encoder.state_dict()
    published = {}
    for theirs, (ours, third) in _names(encoder).items():
        published[theirs] = state[ours] if third is None else state[ours].chunk(3)[third]
    return published


def _state_dict(file: Path, under: tuple[str, ...]) -> dict[str, Tensor]:
    content = read_checkpoint(file)
    state = content
    for key in under:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            state = content[key]
            break
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise LongslideError(
            f"{file}: not a slide-encoder checkpoint: expected a state dict, or one under {' or '.join(under)}"
        )
    if any(_TEACHER in key for key in state):
        state = {key.split(_TEACHER)[-1]: value for key, value in state.items() if _TEACHER in key}
    for wrapper in _WRAPPERS:
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _names(encoder: nn.Module) -> dict[str, tuple[str, int | None]]:
    """Published name -> (our name, which third of it or None for all), q before k before v."""
    assert isinstance(encoder, Published)
    ours = set(encoder.state_dict())
    names: dict[str, tuple[str, int | None]] = {}
    for theirs, our in encoder.PUBLISHED.items():
        stem, third = (our[:-3], int(our[-2])) if our.endswith("]") else (our, None)
        pattern = re.compile(re.escape(stem).replace(r"\{i\}", r"(?P<i>\d+)") + r"(?P<suffix>|\.weight|\.bias)")
        found = [match for name in ours if (match := pattern.fullmatch(name))]
        for match in sorted(found, key=lambda match: (int(match.groupdict().get("i", 0)), match["suffix"])):
            number = match.groupdict().get("i", "")
            names[encoder.ROOT + theirs.replace("{i}", number) + match["suffix"]] = (match[0], third)
    return names
