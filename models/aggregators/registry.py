"""Which aggregators there are, and how one is chosen. Nothing here imports torch, so a command line is parsed without it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...registry import Chosen, Registry

if TYPE_CHECKING:
    from .base import Aggregator

AGGREGATORS: "Registry[Aggregator]" = Registry(
    "aggregator",
    "longslide.models.aggregators.base:Aggregator",
    {
        "longnet": "longslide.models.aggregators.slide_encoder:LongNetAggregator",
        "gigapath": "longslide.models.aggregators.slide_encoder:GigaPathAggregator",
        "titan": "longslide.models.aggregators.published:TITANAggregator",
        "prism": "longslide.models.aggregators.published:PRISMAggregator",
        "moozy": "longslide.models.aggregators.published:MOOZYAggregator",
        "chief": "longslide.models.aggregators.published:CHIEFAggregator",
        "feather": "longslide.models.aggregators.published:FeatherAggregator",
        "madeleine": "longslide.models.aggregators.published:MADELEINEAggregator",
        "cobra": "longslide.models.aggregators.published:COBRAAggregator",
        "abmil": "longslide.models.aggregators.abmil:ABMIL",
        "transmil": "longslide.models.aggregators.transmil:TransMIL",
        "mean": "longslide.models.aggregators.pool:MeanPool",
        "max": "longslide.models.aggregators.pool:MaxPool",
        "moozy-case": "longslide.models.aggregators.moozy_case:MOOZYCase",
        "linear-probe": "longslide.models.aggregators.linear_probe:LinearProbe",
    },
)
"""The aggregators."""

READ_SLIDE_EMBEDDINGS = frozenset({"linear-probe", "moozy-case"})
"""Those of the package that read the slide embeddings of the feature files: known here without their classes."""


@dataclass(frozen=True)
class AggregatorChoice(Chosen):
    """An aggregator with its options: `AggregatorChoice("abmil", {"width": 256})`.

    Attributes:
        class_path: Its registered name, or the dotted path of its class.
        init_args: Its options, by the names of its constructor's arguments.
    """

    registry: ClassVar[Registry["Aggregator"]] = AGGREGATORS

    @property
    def reads_slide_embedding(self) -> bool:
        """Whether it reads the slide embeddings of the feature files; that of the package is known without its class."""
        if self.class_path in AGGREGATORS.builtin:
            return self.class_path in READ_SLIDE_EMBEDDINGS
        return AGGREGATORS.get(self.class_path).reads_slide_embedding
