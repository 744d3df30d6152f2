"""What the tokens of a slide see in each layer of a slide encoder, by the rule of its attention pattern or by its choice."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import LongslideError

if TYPE_CHECKING:
    from ...data.features.features import Features
    from ...models.slide_encoder.encoder import SlideEncoder
    from ...models.slide_encoder.spec import SlideEncoderSpec

CLS_TOKENS = 1
"""Tokens before those of the tiles: the class token takes part in attention."""

Sees = Callable[[int, np.ndarray], np.ndarray]
"""`(layer, (L,) bool of the tokens that look) -> (branches, heads, L)` bool of the keys that some of them see."""


@dataclass(frozen=True)
class Sight:
    """What tokens see.

    Attributes:
        name: Name of the slide encoder, and its pattern if that is not dilated attention.
        pattern: The attention pattern.
        tokens: Tokens of the slide, the class token first.
        heads: Attention heads.
        layers: Layers.
        labels: What each branch sees, in words; one for patterns without branches.
        branches: Segment length and ratio of each branch of dilated attention; else empty.
        pairs: Query-key pairs that all heads of a layer score.
        sees: Which keys are seen.
    """

    name: str
    pattern: str
    tokens: int
    heads: int
    layers: int
    labels: Sequence[str]
    branches: Sequence[tuple[int, int]]
    pairs: int
    sees: Sees

    def seen_by(self, tile: int) -> np.ndarray:
        """`(branches, heads, L)` bool, the keys that a tile sees in the last layer."""
        return self.sees(self.layers - 1, np.arange(self.tokens) == tile + CLS_TOKENS)

    def share_seen(self, tile: int) -> float:
        """Share of the tiles that a tile sees in the last layer."""
        return float(self.seen_by(tile)[:, :, CLS_TOKENS:].any((0, 1)).mean())


def keys_seen(queries: np.ndarray, heads: int, branches: Sequence[tuple[int, int]]) -> np.ndarray:
    """Keys that some of the queries see in one layer of dilated attention, by its rule (docs/design.md, section 3).

    Args:
        queries: `(L,)` bool, the tokens that look.
        heads: Attention heads.
        branches: Segment length and dilated ratio of each branch.

    Returns:
        `(branches, heads, L)` bool.
    """
    tokens = len(queries)
    place = np.arange(tokens)
    seen = np.zeros((len(branches), heads, tokens), bool)
    for branch, (length, ratio) in enumerate(branches):
        segment, within = place // length, place % length
        for head in range(heads):
            kept = within % ratio == head // math.ceil(heads / ratio)
            looking = np.zeros(segment[-1] + 1, bool)
            looking[segment[kept & queries]] = True
            seen[branch, head] = kept & looking[segment]
    return seen


def layers_to_reach(query: int, tokens: int, layers: int, sees: Sees) -> np.ndarray:
    """After how many layers what a token holds has reached the query.

    Args:
        query: The query's position.
        tokens: Tokens of the sequence.
        layers: Layers of the encoder.
        sees: Which keys are seen.

    Returns:
        `(L,)` int: 0 for the query, 1 for the keys it sees in the last layer, 2 for what these see in the layer before;
        `layers + 1` where nothing gets through.
    """
    reached = np.full(tokens, layers + 1)
    known = np.arange(tokens) == query
    reached[known] = 0
    for step in range(1, layers + 1):
        new = sees(layers - step, known).any((0, 1)) & ~known
        reached[new] = step
        known |= new
        if known.all():
            break
    return reached


def sight_of_spec(
    spec: "SlideEncoderSpec", heads: int, branches: Sequence[tuple[int, int]], tiles: int, sees: Sees | None = None
) -> Sight:
    """What the tokens of a slide see by the rule of an encoder's pattern.

    Args:
        spec: The facts of the encoder.
        heads: Attention heads.
        branches: Segment length and ratio of each branch of dilated attention.
        tiles: Tiles of the slide.
        sees: Which keys are seen, where no rule says so.

    Raises:
        LongslideError: The pattern is `learned`, and what has been learned is not given; or its settings do not fit.
    """
    from ...models.slide_encoder.attention_pattern import check_pattern
    from .attention_map import scored_pairs

    check_pattern(spec.pattern, **spec.pattern_settings)
    tokens = tiles + CLS_TOKENS
    dilated = spec.pattern == "dilated"
    if sees is None:
        sees = _by_rule(spec, heads, branches, tokens)
    settings: Any = spec.pattern_settings
    return Sight(
        name=spec.name if dilated else f"{spec.name}, {spec.pattern}",
        pattern=spec.pattern,
        tokens=tokens,
        heads=heads,
        layers=spec.layers,
        labels=[f"segments of {length:,}, ratio {ratio}" for length, ratio in branches] if dilated else [spec.pattern],
        branches=branches if dilated else (),
        pairs=sum(scored_pairs(tokens, heads, spec.pattern, False, branches=branches, **settings)),
        sees=sees,
    )


def _by_rule(spec: "SlideEncoderSpec", heads: int, branches: Sequence[tuple[int, int]], tokens: int) -> Sees:
    if spec.pattern == "dilated":
        return lambda layer, known: keys_seen(known, heads, branches)
    if spec.pattern == "random":
        return lambda layer, known: _random_seen(spec, heads, layer, known)
    if spec.pattern == "learned":
        raise LongslideError(
            f"slide encoder {spec.name!r} chooses by what the tiles show: give the model that has learned to as --checkpoint"
        )

    def sees(layer: int, known: np.ndarray) -> np.ndarray:
        """The same in each head and layer."""
        looking = np.flatnonzero(known)
        seen = np.ones(tokens, bool)
        if spec.pattern == "strided":
            seen = np.isin(np.arange(tokens) % spec.period, looking % spec.period)
        elif spec.pattern == "sliding-window":
            seen = _near(looking, tokens, spec.window)
        return np.broadcast_to(seen, (1, heads, tokens))

    return sees


def _near(looking: np.ndarray, tokens: int, window: int) -> np.ndarray:
    steps = np.zeros(tokens + 1, int)
    np.add.at(steps, np.maximum(looking - window, 0), 1)
    np.add.at(steps, np.minimum(looking + window + 1, tokens), -1)
    return np.asarray(steps[:-1].cumsum() > 0)


def _random_seen(spec: "SlideEncoderSpec", heads: int, layer: int, known: np.ndarray) -> np.ndarray:
    import torch

    from ...models.slide_encoder.encoder import layer_pattern_settings
    from ...models.slide_encoder.random_attention import random_key_positions

    looking, tokens = np.flatnonzero(known), len(known)
    seen = np.repeat(_near(looking, tokens, spec.window)[None], heads, 0)
    seed = layer_pattern_settings(spec, layer)["pattern_seed"]
    position, is_one = random_key_positions(torch.from_numpy(looking), heads, tokens, spec.random_keys, seed, False)
    for head in range(heads):
        seen[head, position[head][is_one[head]].numpy()] = True
    seen[:, : spec.global_tokens] = True
    if known[: spec.global_tokens].any():
        seen[:] = True
    return seen[None]


def sight_of_model(checkpoint: Path, features: "Features") -> Sight:
    """What the tokens of a slide see in a trained model: of the pattern `learned` the blocks that it chooses on this slide.

    Args:
        checkpoint: A `.ckpt` of `fit` or `crossval` with LongNet, or of `pretrain`.
        features: The slide's features, with embeddings.

    Raises:
        LongslideError: The model has no LongNet, or does not read such features.
    """
    encoder = _slide_encoder(checkpoint)
    spec = encoder.spec
    branches = tuple(zip(spec.segment_lengths, spec.dilated_ratios, strict=True))
    sees = _by_choice(encoder, features) if spec.pattern == "learned" else None
    return sight_of_spec(spec, spec.heads, branches, len(features.coords), sees)


def _slide_encoder(checkpoint: Path) -> "SlideEncoder":
    from ...models.checkpoint_file import read_description
    from ...models.classifier.checkpoint import load_classifier
    from ...models.slide_encoder.base import read_pretrained
    from ...models.slide_encoder.encoder import SlideEncoder

    if (read_description(checkpoint) or {}).get("kind") == "mae":
        return read_pretrained(checkpoint)
    classifier = load_classifier(checkpoint)
    for module in classifier.modules():
        if isinstance(module, SlideEncoder):
            return module
    raise LongslideError(
        f"{checkpoint}: {classifier.aggregator_name} has no attention pattern; give a model with LongNet"
    )


def _by_choice(encoder: "SlideEncoder", features: "Features") -> Sees:
    """Ask each layer which blocks it chooses while the encoder reads the slide."""
    import torch

    from ...models.slide_encoder.learned_attention import choose_blocks
    from ...models.slide_encoder.longnet import LongNetLayer

    size = encoder.spec.block_size
    chosen: list[np.ndarray] = []

    def look(layer: Any, inputs: tuple[Any, ...]) -> None:
        x, _, _, update = inputs
        q, k, _ = layer.project(x, update)[0].unbind(1)
        chosen.append(choose_blocks(q[None], k[None], size, encoder.spec.chosen_blocks)[0][0].numpy())

    hooks = [layer.register_forward_pre_hook(look) for layer in encoder.layers if isinstance(layer, LongNetLayer)]
    try:
        with torch.no_grad():
            encoder(torch.from_numpy(features.features)[None].float(), torch.from_numpy(features.cells)[None])
    finally:
        for hook in hooks:
            hook.remove()

    def sees(layer: int, known: np.ndarray) -> np.ndarray:
        heads, blocks, _ = chosen[layer].shape
        looking = np.unique(np.flatnonzero(known) // size)
        seen = np.zeros((heads, blocks), bool)
        seen[:, looking] = True
        for head in range(heads):
            seen[head, chosen[layer][head, looking]] = True
        return seen.repeat(size, 1)[None, :, : len(known)]

    return sees
