"""The slide classifier: an aggregator, a linear head, and how the two are trained."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ...task import CLASSIFICATION, Task
from ...version import SOFTWARE
from ..aggregators.base import Aggregator, create_aggregator
from ..checkpoint_file import SCHEMA
from .bag_weights import BagWeightedModule
from .cases import CaseRecord
from .objective import Binary, Cox, Multilabel, create_objective
from .optimisation import configure
from .options import ClassifierOptions
from .selection import BagOutputs, class_of, selection_metric


class TrainingFacts(NamedTuple):
    """What a classifier must know of its training data.

    Attributes:
        task: The task.
        feature_dim: Length of a tile embedding; of a slide embedding for the linear probe.
        balanced_weights: Weights that even out the classes of the training bags, or each label's positives and negatives.
        target_mean: Mean of the training targets of a regression.
        target_std: Their standard deviation.
        preprocessing: What made the features, as far as the feature files say: `tile_encoder`, `tile_weights`, ...
    """

    task: Task
    feature_dim: int
    balanced_weights: tuple[float, ...] = ()
    target_mean: float = 0.0
    target_std: float = 1.0
    preprocessing: Mapping[str, Any] = MappingProxyType({})


class SlideClassifier(BagWeightedModule):
    """An aggregator and a linear head.

    Args:
        facts: What must be known of the training data.
        options: Everything else.
        aggregator: The aggregator, if it is not to be made anew by the options.

    Attributes:
        learning_rate: The highest learning rate, of steps that see 8 bags.
        temperature: What the logits of a classification are divided by, fitted on validation bags; None for none.
        intercept: What is added to the log-odds of `binary` then.
        thresholds: Threshold of the probability, by class name (the second one of `binary`) or label; 0.5 of others. Of
            survival the median `risk` of validation, above which a patient counts as of high risk.
        training_features: Statistics of the training features, as a checkpoint holds them.
        fold: The fold it was trained on.
        slide_ids: Numbers of slides in training and validation: `train` and `val`.
        cases: Which patients and slides its training, validation and test part had; None where an older version trained it.
        bag_unit: Whether it was trained on bags of a `slide`, or of all slides of a `patient`.
    """

    def __init__(
        self,
        facts: TrainingFacts,
        options: ClassifierOptions = ClassifierOptions(),
        aggregator: Aggregator | None = None,
    ) -> None:
        super().__init__()
        self.facts = facts._replace(preprocessing=dict(facts.preprocessing))  # averages of the weights copy it
        self.optimiser = options.optimiser
        self.temperature: float | None = None
        self.intercept = 0.0
        self.thresholds: dict[str, float] | None = None
        self.training_features: dict[str, Any] = {}
        self.fold = 0
        self.slide_ids = {"train": 0, "val": 0}
        self.cases: CaseRecord | None = None
        self.bag_unit: Literal["slide", "patient"] = "slide"
        self.aggregator = aggregator or create_aggregator(
            options.aggregator, options.checkpoint, facts.feature_dim, facts.preprocessing.get("tile_encoder")
        )
        self.learning_rate = options.optimiser.learning_rate or self.aggregator.learning_rate
        self.head_dropout = nn.Dropout(options.head_dropout)
        self.head = nn.Linear(self.aggregator.width, facts.task.outputs)
        self.objective = create_objective(
            facts.task,
            _class_weights(options.class_weights, facts),
            facts.target_mean,
            facts.target_std,
            options.cox_ties,
        )
        if options.compile:
            self.aggregator.compile(dynamic=True)  # in place: the names of the weights stay
        self.validation = BagOutputs()

    @property
    def aggregator_name(self) -> str:
        """The aggregator's registered name, or its dotted path."""
        return self.aggregator.name

    @property
    def task(self) -> Task:
        """The task."""
        return self.facts.task

    def loss_thresholds(self, balanced: Sequence[float]) -> dict[str, float]:
        """The share that positives have in the training loss: 0.5 with balanced class weights.

        There a calibrated model has the highest sensitivity + specificity.

        Args:
            balanced: The weights that would even out the training bags, as `TrainingFacts.balanced_weights` has them.

        Returns:
            For `binary` by the name of the second class, for `multilabel` by label; nothing for other tasks.
        """
        names = self.task.classes
        match self.objective:
            case Binary():
                negative, positive = (self.objective.class_weights / torch.tensor(balanced)).tolist()
                return {names[1]: positive / (negative + positive)}
            case Multilabel():
                each = zip(names, self.objective.positive_weights.tolist(), balanced, strict=True)
                return {name: weight / (weight + negatives) for name, weight, negatives in each}
            case _:
                return {}

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The raw outputs of bags, differentiable in `tile_features`.

        Args:
            tile_features: `(T, D)` tile embeddings of all bags, packed end to end; for the linear probe one slide's each.
            grid_cells: `(T, 2)` int64 (column, row) of each tile.
            cu_seqlens: `(B + 1,)` int32 cumulative lengths of the bags, from 0 to T.

        Returns:
            `(B, n_outputs)`, float32 or float64.

        Raises:
            LongslideError: The embeddings are not of the length that it was trained on.
        """
        if tile_features.shape[-1] != self.facts.feature_dim:
            raise LongslideError(
                f"the classifier reads embeddings of length {self.facts.feature_dim}, not {tile_features.shape[-1]}"
            )
        pooled = self.aggregator(tile_features, grid_cells, cu_seqlens)
        outputs: Tensor = self.head(self.head_dropout(pooled.to(self.head.weight.dtype)))
        return outputs.float() if outputs.element_size() < 4 else outputs

    def outputs_of(self, batch: dict[str, Tensor]) -> Tensor:
        """The raw outputs `(B, n_outputs)` of a batch as the data module makes it."""
        return self(batch["tile_features"], batch["grid_cells"], batch["cu_seqlens"])  # type: ignore[no-any-return]

    def use_training_features(self, statistics: dict[str, Any]) -> None:
        """Keep the statistics of the training features for the checkpoint; the linear probe standardises by them.

        Args:
            statistics: `mean` `(D,)` and `std` `(D,)` float32, and what else is known, in plain types and tensors.
        """
        self.training_features = statistics
        self.aggregator.use_training_features(statistics)

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        """Predictions of raw outputs, calibrated.

        Args:
            outputs: `(B, n_outputs)`.

        Returns:
            `probability` `(B, C)` and `prediction` (`(B,)` int64 class, or `(B, C)` 0 or 1 for multilabel); `value` `(B,)`
            for regression; `risk` `(B,)` and `survival` `(B, n_times)` for survival.
        """
        predictions = self.objective.predict(outputs, self.temperature, self.intercept)
        if "probability" in predictions:
            predictions["prediction"] = class_of(self.task, predictions["probability"], self.thresholds)
        return predictions

    # Training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of the losses of a batch.

        Raises:
            LongslideError: It is not finite; on a GPU that of a step before.
        """
        loss, weight = self.objective(self.outputs_of(batch), batch["target"])
        self.later.put(loss, partial(_check_loss, self.global_step))
        return self.weighted_loss(loss, weight)

    def start_group(self) -> None:
        """Begin to accumulate anew."""
        super().start_group()
        if isinstance(self.objective, Cox):
            self.objective.start_group()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Gather the outputs: the loss and the metric are those of all validation bags together."""
        self.validation.update(self.outputs_of(batch), batch["target"], batch["index"])

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and `val_metric`."""
        outputs, target = self.validation.gathered()
        self.validation.reset()
        loss, weight = self.objective(outputs, target)
        self.log("val_loss", loss / weight.clamp(min=1e-12), prog_bar=True)
        metric = selection_metric(self.task, self.objective.predict(outputs), target)
        self.log("val_metric", torch.tensor(metric, device=self.device), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW, with warm-up and cosine at every step."""
        return configure(self, self.optimiser, self.learning_rate, self.trainer)

    # Checkpoints

    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds under `longslide`: all that inference needs beside the weights, in plain types."""
        return {
            "schema": SCHEMA,
            "kind": "classifier",
            "software": SOFTWARE,
            "task": self.task.to_dict(),
            "aggregator": {
                "name": self.aggregator.name,
                "options": self.aggregator.options,
                "architecture": self.aggregator.architecture() or None,
            },
            "target": {"mean": self.facts.target_mean, "std": self.facts.target_std},
            "feature_dim": self.facts.feature_dim,
            "preprocessing": dict(self.facts.preprocessing),
            "training_features": dict(self.training_features),
            "thresholds": self.thresholds,
            "temperature": self.temperature,
            "intercept": self.intercept,
            "fold": self.fold,
            "slide_ids": dict(self.slide_ids),
            "bag_unit": self.bag_unit,
            "cases": None if self.cases is None else self.cases.to_dict(),
        }


def _check_loss(step: int, loss: Tensor) -> None:
    if not math.isfinite(value := float(loss)):
        raise LongslideError(
            f"the loss is {value} at step {step}: lower --model.optimiser.learning_rate, set "
            "--trainer.gradient_clip_val 1, or train with --trainer.precision bf16-mixed instead of 16-mixed"
        )


def _class_weights(choice: str | Sequence[float], facts: TrainingFacts) -> Sequence[float] | None:
    """Weights of the classes in the loss; of classes, not of labels, with mean 1 over the training bags."""
    if isinstance(choice, str):
        return (facts.balanced_weights or None) if choice == "balanced" else None
    if facts.task.kind not in CLASSIFICATION or len(choice) != len(facts.balanced_weights):
        return choice
    shares = [1 / (len(choice) * weight) for weight in facts.balanced_weights]  # of the training bags
    mean = sum(share * weight for share, weight in zip(shares, choice, strict=True))
    return [weight / mean for weight in choice]
