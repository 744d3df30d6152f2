"""What features were made with: which belong together, and what is said of those that do not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from longslide import Features, LongslideError, read_features
from longslide.data.features.feature_file import write_features
from longslide.data.features.preprocessing import Preprocessing, agreed

OURS = Preprocessing(
    tile_encoder="uni2-h",
    tile_weights="hf:org/uni@1 sha256:0123",
    tile_mpp=0.5,
    tile_px=256,
    overlap=0,
    precision="float16",
    min_tissue=0.1,
    tissue_method="longslide-tissue-1",
    tissue_segmenter="optical-density",
    tissue_settings="{}",
)


def test_a_feature_file_says_all_of_it_again_after_it_was_written(tmp_path: Path) -> None:
    features = Features(
        slide_id="a",
        features=np.zeros((1, 4), np.float16),
        coords=np.zeros((1, 2), np.int64),
        step_level0=512,
        encoder=OURS.tile_encoder,
        weights=OURS.tile_weights,
        tile_mpp=OURS.tile_mpp,
        tile_px=OURS.tile_px,
        overlap=OURS.overlap,
        precision=OURS.precision,
        tissue="{}",
        tissue_method=OURS.tissue_method,
        settings={"min_tissue": 0.1, "tissue_segmenter": "optical-density", "tissue_settings": "{}"},
    )
    write_features(tmp_path / "a.h5", features)
    assert Preprocessing.of(read_features(tmp_path / "a.h5")) == OURS
    assert Preprocessing.from_dict(OURS.to_dict()) == OURS


def test_checkpoints_of_earlier_versions_are_read() -> None:
    earlier = {"tile_encoder": "uni2-h", "mpp": 0.5, "tile_px": 256, "overlap": None, "min_tissue": 0.1}
    assert Preprocessing.from_dict(earlier) == Preprocessing("uni2-h", tile_mpp=0.5, tile_px=256, min_tissue=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"tile_weights": "/data/uni.safetensors sha256:0123"},
        {"tile_mpp": 0.5021},
        {"tile_weights": None, "tile_px": None},
        {"slide_encoder": "gigapath"},
    ],
    ids=["weights of one digest at two paths", "mpp within a hundredth", "not stated", "more than is asked for"],
)
def test_these_are_the_same(change: dict[str, object]) -> None:
    other = dataclasses.replace(OURS, **change)  # type: ignore[arg-type]
    assert other.differences(OURS) == ()
    assert OURS.differences(other) == ()


@pytest.mark.parametrize(
    ("change", "said", "decisive"),
    [
        ({"tile_encoder": "uni"}, "tile_encoder uni instead of uni2-h", True),
        ({"tile_weights": "x sha256:4567"}, "tile_weights x sha256:4567 instead of hf:org/uni@1 sha256:0123", True),
        ({"tile_mpp": 0.51}, "tile_mpp 0.51 instead of 0.5", True),
        ({"tile_px": 224}, "tile_px 224 instead of 256", True),
        ({"overlap": 32}, "overlap 32 instead of 0", True),
        ({"precision": "float32"}, "precision float32 instead of float16", False),
        ({"min_tissue": 0.1005}, "min_tissue 0.1005 instead of 0.1", False),
        ({"tissue_settings": '{"a": 1}'}, 'tissue_settings {"a": 1} instead of {}', False),
    ],
)
def test_these_differ(change: dict[str, object], said: str, decisive: bool) -> None:
    [difference] = dataclasses.replace(OURS, **change).differences(OURS)  # type: ignore[arg-type]
    assert str(difference) == said
    assert difference.decisive == decisive


def test_a_classifier_tolerates_what_leaves_embeddings_comparable_and_remarks_it() -> None:
    other = dataclasses.replace(OURS, precision="float32", min_tissue=0.5, overlap=None)
    assert other.unlike_training(OURS) == []
    assert other.remarks(OURS) == [
        "the feature file does not say its overlap",
        "min_tissue 0.5 instead of 0.1 as in training",
    ]
    masked = dataclasses.replace(OURS, tissue_method="mask:a.png sha256:89", tissue_segmenter="mask")
    assert masked.remarks(OURS) == [], "a mask belongs to its slide"
    assert masked.differences(OURS), "which `embed` would have to make anew"


def test_a_cohort_agrees_or_two_of_its_files_are_named() -> None:
    files = [Path("a.h5"), Path("b.h5"), Path("c.h5")]
    moved = dataclasses.replace(OURS, tile_weights="/elsewhere sha256:0123", min_tissue=0.2)
    silent = dataclasses.replace(OURS, tile_px=None)
    common, notes = agreed(files, [OURS, moved, silent])
    assert common == OURS
    assert notes == [
        "1 feature file does not say tile_px; taken for 256: c.h5",
        "the feature files differ in min_tissue: 0.1, 0.2",
    ]
    with pytest.raises(LongslideError, match=r"overlap is 0 in a\.h5 and 32 in b\.h5; embed all slides alike"):
        agreed(files, [OURS, dataclasses.replace(OURS, overlap=32), silent])
