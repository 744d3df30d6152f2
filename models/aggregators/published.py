"""Published slide encoders of other architectures than GigaPath's as aggregators: frozen, or to fine-tune."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ...errors import LongslideError
from ..slide_encoder.base import from_architecture
from ..slide_encoder.encoder import create_slide_encoder
from ..slide_encoder.gated_attention import GatedSlideEncoder
from ..slide_encoder.published import PublishedSlideEncoder
from ..slide_encoder.spec import PublishedSpec, load_slide_encoder_spec
from .slide_encoder import SlideEncoderAggregator, check_length


class PublishedAggregator(SlideEncoderAggregator):
    """A published slide encoder, whose slide embedding is the bag's vector.

    Args:
        feature_dim: Length of a tile embedding.
        slide_encoder: Name of a slide encoder of this architecture, or path of its YAML file; none for the one of this name.
        frozen: Whether the encoder stays as it is and only the head is trained.
        checkpointing: Whether layers are computed again in the backward, for memory.
        checkpoint: Weights as published, or the word `random`; none takes the published weights from the hub or its cache.
        architecture: What `architecture()` of the trained module said: to build it again, without weights.

    Raises:
        LongslideError: The weights are unavailable, or do not fit the features or this architecture.
    """

    published: ClassVar[str]
    """The slide encoder of this name."""

    learning_rate = 1e-4
    encoder: PublishedSlideEncoder

    def __init__(
        self,
        feature_dim: int,
        slide_encoder: str | None = None,
        frozen: bool = False,
        checkpointing: bool = False,
        checkpoint: str | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        if architecture is not None:
            encoder = from_architecture(architecture, "mean")
        else:
            spec, known = (load_slide_encoder_spec(name or self.published) for name in (slide_encoder, None))
            assert isinstance(known, PublishedSpec)
            if not isinstance(spec, PublishedSpec) or spec.architecture != known.architecture:
                raise LongslideError(
                    f"slide encoder {spec.name!r} is no {known.architecture}: it is another aggregator"
                )
            changes: dict[str, Any] = {"tile_dim": feature_dim, "tile_encoder": ""} if checkpoint == "random" else {}
            encoder = create_slide_encoder(slide_encoder or self.published, checkpoint=checkpoint, **changes)
            check_length(encoder, feature_dim)
        assert isinstance(encoder, PublishedSlideEncoder)
        encoder.checkpointing = checkpointing
        super().__init__(encoder, frozen=frozen)


class GatedAggregator(PublishedAggregator):
    """One that weighs tiles by attention, which `--explain attention` shows."""

    encoder: GatedSlideEncoder

    def attention_weights(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The weight of each tile in its bag's vector; see `GatedSlideEncoder.attention_weights`."""
        return self.encoder.attention_weights(tile_features, grid_cells, cu_seqlens)


class TITANAggregator(PublishedAggregator):
    """TITAN's slide encoder; options as of `PublishedAggregator`."""

    published = "titan"


class PRISMAggregator(PublishedAggregator):
    """PRISM's slide encoder; options as of `PublishedAggregator`."""

    published = "prism"


class MOOZYAggregator(PublishedAggregator):
    """MOOZY's slide encoder; options as of `PublishedAggregator`."""

    published = "moozy"


class CHIEFAggregator(GatedAggregator):
    """CHIEF's slide encoder; options as of `PublishedAggregator`."""

    published = "chief"


class FeatherAggregator(GatedAggregator):
    """FEATHER; options as of `PublishedAggregator`."""

    published = "feather"


class MADELEINEAggregator(GatedAggregator):
    """MADELEINE; options as of `PublishedAggregator`."""

    published = "madeleine"


class COBRAAggregator(GatedAggregator):
    """COBRA; options as of `PublishedAggregator`."""

    published = "cobra2-uni"
