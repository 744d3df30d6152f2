"""The options of a slide classifier. Nothing here imports torch, so that a command line is parsed without it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..aggregators.registry import AggregatorChoice


@dataclass(frozen=True)
class OptimiserOptions:
    """Options of the optimiser.

    Attributes:
        learning_rate: The highest learning rate, at the end of the warm-up, of steps that see 8 bags. Steps that see n bags
            take sqrt(n / 8) of it, as suits Adam (https://arxiv.org/abs/2205.10287). Default: the aggregator's own.
        min_learning_rate: The one that the cosine ends at.
        weight_decay: Weight decay of matrices; biases, norms and tokens have none.
        warmup: Share of all steps over which the learning rate rises from 0.
        layer_decay: Factor of the learning rate from each layer of a slide encoder to the one below it; 1 for none.
        betas: AdamW's two decay rates.
    """

    learning_rate: float | None = None
    min_learning_rate: float = 0.0
    weight_decay: float = 0.05
    warmup: float = 0.05
    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class ClassifierOptions:
    """What a slide classifier is, beside what its training data say.

    Attributes:
        aggregator: How the tiles of a bag become one vector: `longnet` from scratch, a pretrained `gigapath`, the baselines
            `abmil`, `transmil`, `mean` and `max`, a `linear-probe` on the slide embeddings of the feature files, or the
            dotted path of a class of your own; with options, an `AggregatorChoice`.
        checkpoint: Weights of the slide encoder that `longnet` or `gigapath` begins with: a checkpoint of
            `longslide pretrain`, for `gigapath` also a published file, or the word `random`. Default: random weights for
            `longnet`, the published ones for `gigapath`.
        head_dropout: Share of the values of a bag's vector that are dropped before the head.
        class_weights: Weights of the classes in the loss: `none`, `balanced` (inverse to the number of training bags), or a
            number for each class, of which only the ratios matter; for multilabel, of each label's positives.
        cox_ties: How Cox's likelihood takes events of one time: `breslow`, or `efron`, better where many are.
        optimiser: Options of the optimiser.
        compile: Whether the aggregator is compiled by `torch.compile`.
    """

    aggregator: str | AggregatorChoice = "longnet"
    checkpoint: str | Path | None = None
    head_dropout: float = 0.0
    class_weights: Literal["none", "balanced"] | list[float] = "none"
    cox_ties: Literal["breslow", "efron"] = "breslow"
    optimiser: OptimiserOptions = OptimiserOptions()
    compile: bool = False

    @property
    def chosen(self) -> AggregatorChoice:
        """The aggregator and its options."""
        return AggregatorChoice.of(self.aggregator)
