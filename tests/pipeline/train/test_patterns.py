"""Attention patterns beside LongNet's, from the command line and YAML: trained, read back, explained, embedded, pictured."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from longslide import create_slide_encoder, explain, export, read_features
from longslide.errors import LongslideError
from longslide.models.classifier.checkpoint import load_classifier
from longslide.pipeline.attention_map.attention_map import attention_map
from longslide.pipeline.attention_map.sight import sight_of_model
from longslide.pipeline.cli import main
from training_cohort import quick, write_cohort

SMALL = {"layers": 2, "width": 32, "heads": 4, "ffn_width": 32, "dropout": 0.0}
PATTERNS: dict[str, dict[str, str | int]] = {
    "random": {"pattern": "random", "random_keys": 3, "window": 1, "global_tokens": 1, "pattern_seed": 7},
    "learned": {"pattern": "learned", "block_size": 2, "chosen_blocks": 1},
}


def options(pattern: str) -> list[str]:
    chosen = [("", "longnet"), *((f".{name}", str(value)) for name, value in (SMALL | PATTERNS[pattern]).items())]
    return [word for name, value in chosen for word in (f"--model.aggregator{name}", value)]


def job(cohort: list[str], run: Path, *more: str) -> list[str]:
    return ["--data.task", "binary", *cohort, *quick(run), "--min-steps", "4", *more]


@pytest.fixture(scope="module", params=list(PATTERNS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[str]]:
    """A pattern, the folder of a run with it, and the words that name the cohort."""
    folder = tmp_path_factory.mktemp(request.param)
    cohort = write_cohort(folder)
    words = job(cohort, folder / "run", "--epochs", "2", "--data.test_share", "0.3")
    assert main(["fit", *words, *options(request.param)]) == 0
    return request.param, folder, cohort


@pytest.mark.slow
def test_a_checkpoint_brings_its_pattern_back_and_says_the_same(trained: tuple[str, Path, list[str]]) -> None:
    pattern, folder, _ = trained
    one, again = (load_classifier(folder / "run" / "best.ckpt") for _ in range(2))
    spec = one.aggregator.encoder.spec
    assert {name: getattr(spec, name) for name in PATTERNS[pattern]} == PATTERNS[pattern]
    features = read_features(sorted((folder / "features").glob("*.h5"))[0])
    tiles = torch.from_numpy(features.features).float(), torch.from_numpy(features.cells)
    bounds = torch.tensor([0, len(features.coords)], dtype=torch.int32)
    with torch.inference_mode():
        assert torch.equal(one(*tiles, bounds), again(*tiles, bounds))


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["random"], indirect=True)
def test_yaml_trains_what_the_command_line_trains(trained: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    pattern, folder, cohort = trained
    config = {"model": {"aggregator": {"class_path": "longnet", "init_args": SMALL | PATTERNS[pattern]}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    words = job(cohort, tmp_path / "run", "--epochs", "2", "--data.test_share", "0.3")
    assert main(["fit", "--config", str(tmp_path / "job.yaml"), *words]) == 0
    one, other = (load_classifier(run / "run" / "best.ckpt").state_dict() for run in (folder, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["learned"], indirect=True)
def test_folds_are_trained(trained: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    pattern, _, cohort = trained
    words = job(cohort, tmp_path / "run", "--epochs", "1", "--folds", "2")
    assert main(["crossval", *words, *options(pattern)]) == 0
    assert len(list((tmp_path / "run").glob("*/best.ckpt"))) == 2


@pytest.mark.slow
def test_tiles_are_explained(trained: tuple[str, Path, list[str]]) -> None:
    _, folder, _ = trained
    feature_file = sorted((folder / "features").glob("*.h5"))[0]
    scores = explain(feature_file, folder / "run" / "best.ckpt")
    assert np.isfinite(scores.scores).all()
    assert max(scores.completeness_error.values()) < 0.05 * np.abs(scores.scores).sum() + 1e-3


@pytest.mark.slow
def test_features_are_embedded_by_an_encoder_of_the_pattern(
    trained: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    pattern, folder, _ = trained
    encoder = {"name": f"my-{pattern}", "hub_id": None, "hub_file": None, "tile_encoder": "", "dilated_ratios": [1]}
    encoder |= {"max_wsi_size": 262144, "tile_size": 256, "licence": "", "gated": False, "paper": ""}
    encoder |= {"tile_dim": read_features(next((folder / "features").glob("*.h5"))).features.shape[1]}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(encoder | SMALL | PATTERNS[pattern]))
    words = ["--slide-encoder", str(tmp_path / "my.yaml"), "--slide-checkpoint", "random"]
    assert main(["embed", str(folder / "features"), *words, "--output", str(tmp_path / "out")]) == 0
    embeddings = [read_features(path).slide_embedding for path in sorted((tmp_path / "out").glob("*.h5"))]
    assert len(embeddings) > 10
    assert all(embedding is not None and np.isfinite(embedding).all() for embedding in embeddings)


@pytest.mark.slow
def test_an_exported_encoder_says_what_the_trained_one_says(
    trained: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    _, folder, _ = trained
    (tmp_path / "mine.yaml").write_text("model: {aggregator: longnet}\n")  # of a training, say
    with pytest.raises(LongslideError, match="is there already, and is no slide encoder"):
        export(checkpoint=folder / "run" / "best.ckpt", output=tmp_path / "mine.pth")
    (tmp_path / "mine.yaml").unlink()
    for _ in range(2):  # its own files it replaces
        export(checkpoint=folder / "run" / "best.ckpt", output=tmp_path / "mine.pth")
    exported = create_slide_encoder(tmp_path / "mine.yaml", checkpoint=tmp_path / "mine.pth")
    features = read_features(next((folder / "features").glob("*.h5")))
    tiles = torch.from_numpy(features.features)[None].float(), torch.from_numpy(features.cells)[None]
    with torch.inference_mode():
        encoder = load_classifier(folder / "run" / "best.ckpt").aggregator.encoder
        assert torch.equal(exported(*tiles), encoder(*tiles))


@pytest.mark.slow
def test_the_map_of_a_slide_shows_what_its_tiles_see_in_the_trained_model(
    trained: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    _, folder, _ = trained
    feature_file, checkpoint = sorted((folder / "features").glob("*.h5"))[0], folder / "run" / "best.ckpt"
    drawn = attention_map(tmp_path / "map.png", slide=feature_file, checkpoint=checkpoint)
    assert 0 < drawn.seen < 1
    assert drawn.output.stat().st_size > 20_000

    # Beside it: through which tiles a token's output of the last layer changes, with its queries and keys as they are.
    features = read_features(feature_file)
    sight = sight_of_model(checkpoint, features)
    encoder = load_classifier(checkpoint).aggregator.encoder
    layer, tile = encoder.layers[-1], 5
    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, given: inputs.extend(x for x in (given[0], given[3]) if x is not None)
    )
    with torch.no_grad():
        encoder(torch.from_numpy(features.features)[None].float(), torch.from_numpy(features.cells)[None])
        q, k, v = layer.project(inputs[0], inputs[1] if len(inputs) > 1 else None)[0].unbind(1)
    hook.remove()
    v = v.clone().requires_grad_()
    bounds = torch.tensor([0, len(v)], dtype=torch.int32)
    flowing = layer._attend(torch.stack([q, k, v], 1), None, bounds, None)[tile + 1]
    (flows,) = torch.autograd.grad(flowing.sum(), v)
    assert ((flows != 0).any(-1).T.numpy() == sight.seen_by(tile)[0]).all()
