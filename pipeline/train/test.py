"""Evaluate a trained classifier on another cohort."""

from pathlib import Path
from typing import Literal

from ...data.cohort.options import DataOptions
from ...errors import LongslideError
from ...ranges import checked
from ...registry import import_plugins
from ..predict.checkpoint_features import check_exist
from ..report.run_folder import Run
from .run import TrainingRun, print_metrics
from .settings import column_names, configuration, settle


@checked
def test(
    checkpoint: str | Path,
    data: DataOptions,
    run: str | Path | None = None,
    plugins: list[str] | str | None = None,
    subgroups: list[str] | str = "",
    accelerator: str = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    allow_seen: bool = False,
) -> Run:
    """Evaluate a trained classifier on another cohort. The task, and what it was trained on, are the checkpoint's.

    Args:
        checkpoint: A checkpoint of `longslide fit` or `crossval`.
        data: The cohort, all of which is tested on.
        run: Run folder. Default: `runs/<run>-test`.
        plugins: Modules to import first: those of your own classes that the checkpoint names.
        subgroups: Columns of the table by which to evaluate too, separated by commas. Default: site, if there is one.
        accelerator: Device, as Lightning names it.
        precision: Lightning's precision.
        allow_seen: Also take patients and slides that were in the classifier's training or validation part. All results are
            marked: they are not a test of it.

    Returns:
        The finished run: its folder, predictions and metrics.

    Raises:
        LongslideError: Wrong usage or input, features that the classifier was not trained on, or slides that it was.
    """
    import_plugins(plugins)
    checkpoint = Path(checkpoint)
    check_exist([checkpoint])
    if checkpoint.is_dir():
        one = next(
            (path for path in (checkpoint / "best.ckpt", checkpoint / "fold_0" / "best.ckpt") if path.is_file()), ""
        )
        raise LongslideError(f"{checkpoint}: a folder; test takes one checkpoint" + (f", such as {one}" if one else ""))
    if data.table is None:
        raise LongslideError("longslide test needs labels: give --data.table; `longslide predict` does without")
    settle("test", data)
    folder = Path(run or f"runs/{checkpoint.resolve().parent.name}-test")
    options = {"checkpoint": checkpoint, "data": data, "run": folder, "subgroups": subgroups}
    options |= {"accelerator": accelerator, "precision": precision, "allow_seen": allow_seen}
    record = TrainingRun(folder, configuration("test", options), column_names(subgroups))

    from .training import describe_model, open_test_data, predict_test_part, quieten

    quieten()
    classifier, tested, seen = open_test_data(checkpoint, data, allow_seen)
    if record.finished:
        finished = record.again(tested.cohort)
        print_metrics(finished)
        return finished
    record.begin(tested.cohort)
    record.describe(
        tested,
        command="test",
        checkpoint=str(checkpoint),
        aggregator=describe_model(classifier),
        counts=[row | {"fold": 0} for row in tested.counts()],
        seen=seen.to_dict(),
        risk_threshold=(classifier.thresholds or {}).get("risk"),
    )
    rows = predict_test_part(classifier, tested, seen, accelerator, precision)
    finished = record.finish([rows], classifier.task, tested.cohort.rows)
    print_metrics(finished)
    return finished
