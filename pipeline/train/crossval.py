"""Cross-validation: a model a fold, and the predictions of every patient by the model that has not seen it."""

from collections.abc import Sequence

from ...errors import LongslideError
from .fit import aggregator_facts, held_out_predictions, train
from .options import TrainingCLI
from .run import TrainingRun, tell


def crossval(argv: Sequence[str]) -> int:
    """Run `longslide crossval`.

    Args:
        argv: The words after `crossval`.

    Returns:
        The exit status, 0.

    Raises:
        LongslideError: Wrong usage or input.
    """
    cli = TrainingCLI("crossval", argv)
    if cli.method != "classifier":
        raise LongslideError("crossval trains classifiers; pretrain with `longslide fit`")
    run = TrainingRun(cli.run, cli.resolved(), cli.subgroups)
    predictions, counts = [], []
    fold, folds = 0, 1
    while fold < folds:
        training = cli.build(fold)
        data, trainer = training.data, training.trainer
        if trainer.world_size > 1:
            raise LongslideError(
                "crossval trains on one device; train the folds by `longslide fit --data.fold` on several"
            )
        folds = data.fold_count
        counts += [row | {"fold": fold} for row in data.counts()]
        run.describe(
            data, data.task, command="crossval", aggregator=aggregator_facts(training), seed=cli.seed, counts=counts
        )
        print(f"fold {fold} of {folds}")
        train(training, run)
        predictions += held_out_predictions(training)
        fold += 1
    metrics = run.finish(predictions, data.task, bootstrap=cli.config["bootstrap"], cohort=data.cohort.rows)
    tell(metrics, cli.run)
    return 0
