"""What is known of a slide encoder: the facts of one YAML file of `configs/slide_encoders/`, without torch."""

import difflib
import math
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ...errors import LongslideError
from ...registry import is_factory
from ...yaml_file import read_yaml
from ..spec_file import NonNegativeInt, PositiveInt, Share, Shown, read_spec

Pattern = Literal["dilated", "dense", "sliding-window", "strided", "random", "learned"]

PATTERN_SETTINGS: dict[str, dict[str, int]] = {
    "window": {"sliding-window": 1, "random": 0},
    "period": {"strided": 1},
    "random_keys": {"random": 1},
    "global_tokens": {"random": 0},
    "pattern_seed": {"random": 0},
    "block_size": {"learned": 1},
    "chosen_blocks": {"learned": 1},
}
"""Of each setting of a pattern, the patterns it is for, and the least that it may be there; elsewhere it is 0."""

Architecture = Literal["titan", "moozy", "chief", "feather", "madeleine", "prism", "cobra"]
"""Architectures of slide encoders beside GigaPath's LongNet."""


@dataclass(frozen=True, kw_only=True)
class SlideEncoderFacts:
    """What is known of any slide encoder: the keys that each of the YAML files has.

    Attributes:
        name: The name users give.
        hub_id: Repository on the Hugging Face hub, or null if it has no weights there.
        hub_file: The weights file there.
        tile_encoder: The tile encoder whose embeddings the published weights read.
        tile_dim: Length of a tile embedding.
        licence: Licence of the weights.
        gated: Whether the hub asks for an account that has accepted the terms.
        paper: Link to the paper.
        shown: What our code was held against, for equal weights and tiles.
    """

    name: str
    hub_id: str | None
    hub_file: str | None
    tile_encoder: str
    tile_dim: PositiveInt
    licence: str
    gated: bool
    paper: str
    shown: Shown = "not shown"


@dataclass(frozen=True, kw_only=True)
class PublishedSpec(SlideEncoderFacts):
    """A slide encoder of another architecture than GigaPath's: the keys of its YAML file.

    Attributes:
        architecture: The architecture.
        arguments: Its sizes: arguments of the architecture's class (`models/slide_encoder/published.py` lists them).
    """

    architecture: Architecture
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SlideEncoderSpec(SlideEncoderFacts):
    """A slide encoder of GigaPath's architecture: the keys of its YAML file.

    Attributes:
        layers: LongNet layers.
        width: Width of the tokens and of the slide embedding; a multiple of 4.
        heads: Attention heads.
        ffn_width: Width of the feed-forward networks.
        dilated_ratios: Dilated ratio of each branch.
        max_wsi_size: Edge of the largest slide in pixels; with `tile_size` it sets the longest segment.
        tile_size: Edge of a tile in pixels.
        dropout: Share of values dropped in training.
        drop_path: Share of slides for which the last layer's halves are left out in training; less before it.
        checkpointing: Whether layers are computed again in the backward instead of kept: less memory, more time.
        pattern: Which keys a token sees: `dilated`, or to compare `dense`, `sliding-window`, `strided`, `random` or
            `learned`; see `attention`.
        window: Tokens seen on either side, for the pattern `sliding-window`, and if wanted for `random`.
        period: Distance of the keys from one another, for the pattern `strided`.
        random_keys: Random keys of each token, for the pattern `random`.
        global_tokens: First tokens that see all and that all see, for the pattern `random`; the very first is the cls token.
        pattern_seed: Which random keys, for the pattern `random`; each layer has others.
        block_size: Tokens of a block, for the pattern `learned`.
        chosen_blocks: Blocks that each block chooses to see besides itself, for the pattern `learned`.
    """

    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    ffn_width: PositiveInt
    dilated_ratios: tuple[PositiveInt, ...]
    max_wsi_size: PositiveInt
    tile_size: PositiveInt
    dropout: Share = 0.0
    drop_path: Share = 0.0
    checkpointing: bool = False
    pattern: Pattern = "dilated"
    window: NonNegativeInt = 0
    period: NonNegativeInt = 0
    random_keys: NonNegativeInt = 0
    global_tokens: NonNegativeInt = 0
    pattern_seed: NonNegativeInt = 0
    block_size: NonNegativeInt = 0
    chosen_blocks: NonNegativeInt = 0

    @property
    def pattern_settings(self) -> dict[str, int]:
        """The settings of the attention pattern that are not 0, by the names of `PATTERN_SETTINGS`."""
        return {name: getattr(self, name) for name in PATTERN_SETTINGS if getattr(self, name)}

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """Segment length of each branch: from 1,024 to the longest sequence a slide can give, evenly in the exponent."""
        longest = int(math.log2((self.max_wsi_size // self.tile_size) ** 2))
        last = len(self.dilated_ratios) - 1
        return tuple(int(2 ** (10 + (longest - 10) * i / max(1, last))) for i in range(last + 1))


def list_slide_encoders() -> list[str]:
    """Names of the slide encoders, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load_slide_encoder_spec(name: str | Path) -> SlideEncoderSpec | PublishedSpec:
    """The facts of a slide encoder.

    Args:
        name: A slide encoder of the package (see `list_slide_encoders`), or the path of a YAML file.

    Raises:
        LongslideError: There is none of this name (near matches are named), or the YAML file is not right.
    """
    known = list_slide_encoders()
    if name in known:
        return _read(_folder() / f"{name}.yaml")
    if Path(name).suffix in (".yaml", ".yml"):
        spec = _read(Path(name))
        if spec.name in known:
            raise LongslideError(f"{name}: the name {spec.name!r} is taken by a slide encoder of the package.")
        return spec
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise LongslideError(
        f"No slide encoder {str(name)!r}: {hint}Known are {', '.join(known)}. The path of a YAML file or "
        "package.module:factory works too."
    )


def load_longnet_spec(name: str | Path) -> SlideEncoderSpec:
    """The facts of a slide encoder of GigaPath's architecture.

    Raises:
        LongslideError: As of `load_slide_encoder_spec`, or it is of another architecture.
    """
    spec = load_slide_encoder_spec(name)
    if not isinstance(spec, SlideEncoderSpec):
        raise LongslideError(
            f"slide encoder {spec.name!r} is a {spec.architecture}, not a LongNet such as gigapath, which this needs"
        )
    return spec


def reads_any(spec: SlideEncoderFacts, checkpoint: str | Path | None) -> bool:
    """Whether weights that a user gives may read the embeddings of another tile encoder than the published ones.

    Those of a LongNet are perhaps the user's own; those of other architectures are the published ones in a file.
    """
    return checkpoint is not None and (str(checkpoint) == "random" or isinstance(spec, SlideEncoderSpec))


def is_remote(choice: object) -> bool:
    """Whether a choice is a repository on the hub, such as `MahmoodLab/TITAN`, or a folder like one, with its own code."""
    if not isinstance(choice, str | Path) or is_factory(str(choice)):
        return False
    name = str(choice)
    if name in list_slide_encoders() or Path(name).suffix in (".yaml", ".yml"):
        return False
    return Path(name).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) is not None


def trusted(choice: str | Path, trust_remote_code: bool) -> None:
    """Refuse to run code of a repository or folder without the user's word.

    Raises:
        LongslideError: It was not given.
    """
    if not trust_remote_code:
        raise LongslideError(
            f"slide encoder {str(choice)!r} is run by code of its own, which may do all that you may: if you trust it, add "
            "--trust-remote-code"
        )


def _read(path: Path) -> SlideEncoderSpec | PublishedSpec:
    content = read_yaml(path, "slide encoder")
    if isinstance(content, dict) and "architecture" in content:
        return read_spec(path, PublishedSpec, "slide encoder")
    return read_spec(path, SlideEncoderSpec, "slide encoder")


def _folder() -> Path:
    return Path(str(files("longslide.configs"))) / "slide_encoders"
