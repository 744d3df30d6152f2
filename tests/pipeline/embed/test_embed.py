"""The batch job, end to end on real files: what is there afterwards, whatever happened in between."""

import csv
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import tifffile
import torch
from classifier_files import ENCODER
from commands import Command, longslide
from longslide import LongslideError, embed, open_slide, read_features, write_synthetic_slide
from longslide.data.tissue.optical_density import OpticalDensity
from longslide.models.slide_encoder.encoder import SlideEncoder
from longslide.pipeline.batch.claims import claim
from PIL import Image


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "tiny.yaml"
    path.write_text(ENCODER)
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a.svs", "b.svs", "c.tif")):
        write_synthetic_slide(folder / name, size=(1536, 1024), seed=seed)
    return folder


@pytest.fixture
def job(encoder: Path, slides: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "slides": [slides],
        "output": tmp_path / "features",
        "tile_encoder": str(encoder),
        "tile_checkpoint": "random",
        "device": "cpu",
        "threads": 2,
    }


def command(job: dict[str, Any], *more: str) -> list[str]:
    words = ["embed", *map(str, job["slides"])]
    for name, value in job.items():
        if name != "slides":
            words += [f"--{name.replace('_', '-')}", str(value)]
    return [*words, *more]


def summary(output: Path) -> dict[str, dict[str, str]]:
    with (output / "summary.csv").open(newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def content(path: Path) -> dict[str, Any]:
    """Everything in a feature file but when it was made."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        found |= {f"@{key}": value for key, value in file.attrs.items() if key != "created"}
        for name, data in file.items():
            found[name] = data[()].tobytes() if isinstance(data[()], np.ndarray) else data[()]
            found |= {f"{name}@{key}": value for key, value in data.attrs.items()}
    return found


def left_behind(output: Path) -> list[str]:
    return [path.name for path in output.rglob("*.tmp")]


def test_each_slide_becomes_a_feature_file_a_picture_and_a_row(job: dict[str, Any]) -> None:
    results = embed(**job, slide_encoder="gigapath", slide_checkpoint="random")
    assert [result.status for result in results] == ["done"] * 3
    for result in results:
        features = read_features(job["output"] / f"{result.slide_id}.h5")
        assert features.features.shape == (result.tiles, 48)
        assert features.features.dtype == np.float32
        assert features.slide_embedding is not None
        assert features.slide_embedding.shape == (768,)
        assert np.isfinite(features.slide_embedding).all()
        assert features.encoder == "tiny"
        assert features.weights == "random seed=0"
        assert (features.slide_encoder, features.slide_weights, features.pool) == ("gigapath", "random seed=0", "mean")
        assert json.loads(features.tissue or "")["type"] == "FeatureCollection"
        order = features.cells[:, 1] * 10_000 + features.cells[:, 0]
        assert (np.diff(order) > 0).all(), "row by row"
        with Image.open(job["output"] / "qc" / f"{result.slide_id}.jpg") as picture:
            assert picture.width == 1536
        figure = job["output"] / "qc" / "figures" / result.slide_id
        assert f"{result.tiles} tiles</text>" in figure.with_suffix(".svg").read_text()
        assert figure.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        with figure.with_suffix(".csv").open() as table:
            drawn = [(int(row["x"]), int(row["y"]), row["state"]) for row in csv.DictReader(table)]
        assert drawn == [(x, y, "tile") for x, y in features.coords.tolist()]
        assert json.loads(figure.with_suffix(".geojson").read_text()) == json.loads(features.tissue or "")
    rows = summary(job["output"])
    assert set(rows) == {"a", "b", "c"}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert left_behind(job["output"]) == []


def test_paths_may_be_text_in_python(job: dict[str, Any], slides: Path, encoder: Path) -> None:
    [result] = embed([str(slides / "a.svs")], output=str(job["output"]), tile_encoder=encoder, tile_checkpoint="random")
    assert (job["output"] / "a.h5").exists()
    assert result.features == str(job["output"] / "a.h5")


def test_the_embedding_of_a_tile_is_that_of_the_pixels_at_its_coordinates(job: dict[str, Any], encoder: Path) -> None:
    from longslide import create_tile_encoder

    embed(**job)
    features = read_features(job["output"] / "b.h5")
    model = create_tile_encoder(encoder, checkpoint="random")
    with openslide.OpenSlide(features.slide_path) as slide, torch.inference_mode():
        for row in (0, len(features.coords) // 2, -1):
            tile = np.asarray(slide.read_region(tuple(features.coords[row].tolist()), 0, (64, 64)).convert("RGB"))
            expected = model(torch.from_numpy(tile.copy())[None])[0].numpy()
            np.testing.assert_allclose(features.features[row], expected, rtol=1e-4, atol=1e-5)


def test_the_real_slide_is_embedded_from_the_pixels_openslide_reads(job: dict[str, Any], tmp_path: Path) -> None:
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES is not set")
    path = Path(folder) / "CMU-1-Small-Region.svs"
    from longslide.data.tiles.grid import make_grid
    from longslide.data.tiles.stream import TileStream
    from longslide.data.tissue.optical_density import find_tissue

    [result] = embed(**job | {"slides": [path], "tile_px": 256})
    features = read_features(result.features or "")
    assert result.slide_mpp == 0.499
    assert features.tile_size_level0 == 256, "0.499 um/px is read as it is for 0.5"
    with openslide.OpenSlide(path) as direct, open_slide(path) as slide:
        grid = make_grid(slide, find_tissue(slide), tile_mpp=0.5, tile_px=256)
        np.testing.assert_array_equal(grid.coords, features.coords)
        for batch in TileStream(slide, grid):
            for tile, (x, y) in zip(batch.tiles, grid.coords[batch.index].tolist(), strict=True):
                if x + 256 <= 2220 and y + 256 <= 2967:
                    expected = np.asarray(direct.read_region((x, y), 0, (256, 256)).convert("RGB"))
                    np.testing.assert_array_equal(tile, expected)


@pytest.mark.slow
def test_one_bad_slide_never_ends_the_job(job: dict[str, Any], slides: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "text.svs").write_text("not a slide")
    (bad / "empty.tif").touch()
    whole = (slides / "a.svs").read_bytes()
    (bad / "truncated.svs").write_bytes(whole[: len(whole) // 2])
    write_synthetic_slide(bad / "no-mpp.tif", size=(1536, 1024), mpp=None)
    write_synthetic_slide(bad / "small.svs", size=(40, 40))
    Image.new("RGB", (900, 700), "white").save(bad / "blank.png", dpi=(50_800, 50_800))
    done = longslide(*command(job | {"slides": [bad, bad / "blank.png", slides]}))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = summary(job["output"])
    assert {name: row["status"] for name, row in rows.items()} == {
        "text": "failed", "empty": "failed", "truncated": "failed", "no-mpp": "failed", "small": "failed",
        "blank": "skipped", "a": "done", "b": "done", "c": "done",
    }  # fmt: skip
    for name, words in {
        "text": "not a slide", "empty": "0 bytes", "truncated": "truncated", "no-mpp": "--slide-mpp",
        "small": "smaller than one tile", "blank": "no tissue",
    }.items():  # fmt: skip
        assert words in rows[name]["reason"], rows[name]["reason"]
        assert "\n" not in rows[name]["reason"]
    assert sorted(path.stem for path in job["output"].glob("*.h5")) == ["a", "b", "c"]


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_gives_what_an_undisturbed_run_gives(
    job: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed"
    embed(**job | {"output": undisturbed})

    process = Command(command(job, "--batch-size", "1", "--threads", "1"))
    while not (job["output"] / "a.h5").exists():
        assert process.poll() is None, "the job ended before its first slide was there"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (job["output"] / "c.h5").exists(), "killed too late to show anything"

    for leftover in ("b.h5", "c.h5"):  # as a process killed while it wrote would leave them
        (job["output"] / f".{leftover}.1.tmp").write_bytes(b"half a file")
    first = (job["output"] / "a.h5").stat().st_mtime_ns
    assert {result.status for result in embed(**job)} == {"done"}
    assert (job["output"] / "a.h5").stat().st_mtime_ns == first, "done before, not done again"
    for name in ("b", "c"):
        assert content(job["output"] / f"{name}.h5") == content(undisturbed / f"{name}.h5")
    assert left_behind(job["output"]) == []


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line_and_the_next_run_goes_on(job: dict[str, Any]) -> None:
    process = Command(command(job, "--batch-size", "1", "--threads", "1"))
    while not (job["output"] / "a.h5").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "goes on from here" in errors
    embed(**job)
    assert {row["status"] for row in summary(job["output"]).values()} == {"done"}


def test_a_second_run_does_nothing_and_is_still_done(job: dict[str, Any]) -> None:
    embed(**job)
    before = {path: path.stat().st_mtime_ns for path in job["output"].glob("*.h5")}
    results = embed(**job)
    assert {result.status for result in results} == {"done"}
    assert {path: path.stat().st_mtime_ns for path in job["output"].glob("*.h5")} == before
    assert all(row["seconds"] for row in summary(job["output"]).values()), "the rows still describe the first run"


def test_a_slide_may_have_the_name_of_a_file_of_the_job(job: dict[str, Any], slides: Path, tmp_path: Path) -> None:
    names = ["a.svs", "summary.svs", "summary.csv.svs"]
    paths = [shutil.copy(slides / "a.svs", tmp_path / name) for name in names]
    thread = threading.Thread(target=lambda: embed(**job | {"slides": paths}), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "the job waits for itself"
    assert set(summary(job["output"])) == {"a", "summary", "summary.csv"}


def test_made_anew_without_tissue_the_old_file_does_not_stay(job: dict[str, Any], slides: Path) -> None:
    job |= {"slides": [slides / "a.svs"]}
    embed(**job)
    [result] = embed(**job, min_tissue=1.0, tile_px=700, overwrite=True)
    assert (result.status, result.tiles) == ("skipped", 0)
    assert "--min-tissue" in result.reason
    assert not (job["output"] / "a.h5").exists()
    assert summary(job["output"])["a"]["status"] == "skipped"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tile_px": 32}, "tile_px 64 instead of 32"),
        ({"tile_mpp": 1.0}, "tile_mpp 0.5 instead of 1.0"),
        ({"overlap": 8}, "overlap 0 instead of 8"),
        ({"min_tissue": 0.5}, "min_tissue 0.1 instead of 0.5"),
        ({"seed": 1}, "tile_weights random seed=0 instead of random seed=1"),
        ({"precision": "bfloat16"}, "precision float32 instead of bfloat16"),
        ({"slide_mpp": 0.499}, "slide_mpp 0.5 instead of 0.499"),
    ],
)
def test_a_file_made_with_other_settings_is_refused_unless_overwrite(
    job: dict[str, Any], slides: Path, change: dict[str, Any], named: str
) -> None:
    job |= {"slides": [slides / "a.svs"]}
    embed(**job)
    before = content(job["output"] / "a.h5")
    rows = summary(job["output"])
    with pytest.raises(LongslideError) as caught:
        embed(**job | change)
    assert named in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert summary(job["output"]) == rows, "the summary is of the run that was right"
    assert content(job["output"] / "a.h5") == before
    [result] = embed(**job | change, overwrite=True)
    assert result.status == "done"
    assert content(job["output"] / "a.h5") != before


def test_a_mask_or_mpp_given_or_taken_back_later_is_another_setting(job: dict[str, Any], tmp_path: Path) -> None:
    write_synthetic_slide(tmp_path / "a.svs", size=(1536, 1024))
    for name in ("one.png", "other.png"):
        mask = np.zeros((64, 96), np.uint8)
        mask[16:32, 24 : 48 if name == "one.png" else 60] = 255
        Image.fromarray(mask).save(tmp_path / name)
    tables = {
        "plain": "slide\na.svs\n",
        "mpp": "slide,mpp\na.svs,0.499\n",
        "mask": "slide,tissue_mask\na.svs,one.png\n",
        "other mask": "slide,tissue_mask\na.svs,other.png\n",
    }
    for name, table in tables.items():
        (tmp_path / f"{name}.csv").write_text(table)

    def made_anew(name: str) -> str:
        try:
            [result] = embed(**job | {"slides": [tmp_path / f"{name}.csv"]})
        except LongslideError as error:
            embed(**job | {"slides": [tmp_path / f"{name}.csv"]}, overwrite=True)
            return str(error)
        return f"{result.status}: {result.reason}"

    assert made_anew("mpp") == "done: "
    assert "slide_mpp 0.499 was given instead of the file's own" in made_anew("plain")
    assert "tissue_method longslide-tissue-5 instead of mask:one.png" in made_anew("mask")
    assert "tissue_method mask:one.png" in made_anew("other mask")
    assert "instead of longslide-tissue-5" in made_anew("plain")
    assert made_anew("plain") == "done: already complete"


def test_weights_are_the_same_wherever_they_lie(
    job: dict[str, Any], slides: Path, encoder: Path, tmp_path: Path
) -> None:
    from longslide import create_tile_encoder

    for name, seed in (("one", 0), ("other", 1)):
        network = create_tile_encoder(encoder, checkpoint="random", seed=seed).network
        torch.save(network.state_dict(), tmp_path / f"{name}.pth")
    shutil.copy(tmp_path / "one.pth", tmp_path / "copy.pth")
    job |= {"slides": [slides / "a.svs"]}
    results = [embed(**job | {"tile_checkpoint": str(tmp_path / f"{name}.pth")})[0] for name in ("one", "copy")]
    assert [result.status for result in results] == ["done", "done"]
    with pytest.raises(LongslideError, match="tile_weights"):
        embed(**job | {"tile_checkpoint": str(tmp_path / "other.pth")})


def test_another_slide_of_the_same_file_name_is_not_taken_for_the_one_embedded(
    job: dict[str, Any], slides: Path, tmp_path: Path
) -> None:
    embed(**job | {"slides": [slides / "a.svs"]})
    rows = summary(job["output"])
    for suffix in (".svs", ".tif"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        other = write_synthetic_slide(tmp_path / "elsewhere" / f"a{suffix}", size=(1536, 1024), seed=9)
        with pytest.raises(LongslideError, match=r"a\.h5: made otherwise \(made of another slide"):
            embed(**job | {"slides": [other]})
    assert summary(job["output"]) == rows
    assert read_features(job["output"] / "a.h5").slide_path == str(slides / "a.svs")


def test_a_slide_that_has_moved_is_the_same_slide(job: dict[str, Any], slides: Path, tmp_path: Path) -> None:
    embed(**job | {"slides": [slides / "a.svs"]})
    (tmp_path / "moved").mkdir()
    shutil.copy(slides / "a.svs", tmp_path / "moved" / "a.svs")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.svs").symlink_to(slides / "a.svs")
    for folder in ("moved", "linked"):
        [result] = embed(**job | {"slides": [tmp_path / folder / "a.svs"]})
        assert (result.status, result.reason) == ("done", "already complete")


def test_a_slide_copied_again_after_damage_is_another_slide(job: dict[str, Any], slides: Path, tmp_path: Path) -> None:
    whole = (slides / "a.svs").read_bytes()
    place = tmp_path / "a.svs"
    damaged = bytearray(whole)
    middle = len(whole) // 3
    damaged[middle : middle + 20_000] = bytes(20_000)
    place.write_bytes(damaged)
    job |= {"slides": [place], "max_bad_tiles": 1000}
    embed(**job)
    with open_slide(place) as before:
        quickhash = before.quickhash
    place.write_bytes(whole)
    with open_slide(place) as after:
        assert after.quickhash == quickhash, "the damage is where the quickhash does not look"
    with pytest.raises(LongslideError, match="made before the slide file was written again"):
        embed(**job)
    [result] = embed(**job, overwrite=True)
    embed(**job | {"slides": [slides / "a.svs"], "output": tmp_path / "reference"})
    np.testing.assert_array_equal(
        read_features(result.features or "").features, read_features(tmp_path / "reference" / "a.h5").features
    )


def test_a_mistaken_rerun_is_one_refusal_with_status_2_and_the_summary_stays(job: dict[str, Any], slides: Path) -> None:
    embed(**job)
    before = (job["output"] / "summary.csv").read_bytes()
    said = longslide(*command(job, "--tile-mpp", "1.0"))
    assert said.returncode == 2
    assert said.stderr.splitlines()[-1] == (
        f"longslide embed: {job['output']}: all 3 existing results of these slides were made otherwise (tile_mpp 0.5 "
        "instead of 1.0); choose another --output, or --overwrite"
    )
    assert (job["output"] / "summary.csv").read_bytes() == before


def test_one_file_made_otherwise_among_others_fails_alone(job: dict[str, Any], slides: Path) -> None:
    embed(**job | {"slides": [slides / "a.svs"]})
    embed(**job | {"slides": [slides / "b.svs"], "tile_mpp": 1.0})
    results = embed(**job)
    assert {result.slide_id: result.status for result in results} == {"a": "done", "b": "failed", "c": "done"}


def test_a_given_mpp_far_off_the_files_own_is_remarked(job: dict[str, Any], slides: Path) -> None:
    job |= {"slides": [slides / "a.svs"]}
    [near] = embed(**job, slide_mpp=0.47)
    assert near.reason == ""
    [far] = embed(**job, slide_mpp=0.4, overwrite=True)
    assert (far.status, far.reason) == ("done", "slide_mpp 0.4 was given, the file says 0.5")
    row = summary(job["output"])["a"]
    assert (row["reason"], row["slide_mpp"], row["tile_mpp"]) == (far.reason, "0.4", "0.5")
    [none] = embed(**job, slide_mpp=0.1, overwrite=True, tissue=OpticalDensity(min_area=1e7))
    assert none.status == "skipped"
    assert none.reason.endswith("; slide_mpp 0.1 was given, the file says 0.5"), "perhaps that is why"


def test_the_slide_embedding_is_added_later_without_reading_the_slide_again(
    job: dict[str, Any], slides: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "a.svs"
    shutil.copy(slides / "a.svs", copy)
    job |= {"slides": [copy]}
    embed(**job)
    tiles = read_features(job["output"] / "a.h5")
    assert tiles.slide_embedding is None
    untouched = copy.stat()
    copy.write_bytes(bytes(untouched.st_size))  # no longer a slide, which nobody can tell without opening it
    os.utime(copy, ns=(untouched.st_atime_ns, untouched.st_mtime_ns))
    [result] = embed(**job, slide_encoder="gigapath", slide_checkpoint="random")
    assert result.status == "done"
    both = read_features(job["output"] / "a.h5")
    assert both.slide_embedding is not None
    np.testing.assert_array_equal(both.features, tiles.features)
    assert both.tissue == tiles.tissue
    with pytest.raises(LongslideError, match="pool mean instead of cls"):
        embed(**job, slide_encoder="gigapath", slide_checkpoint="random", pool="cls")


def test_a_slide_encoder_that_runs_out_of_memory_does_not_cost_the_tile_embeddings(
    job: dict[str, Any], slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job |= {"slides": [slides / "a.svs"], "slide_encoder": "gigapath", "slide_checkpoint": "random"}
    with monkeypatch.context() as small_memory:

        def out_of_memory(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        small_memory.setattr(SlideEncoder, "forward", out_of_memory)
        [result] = embed(**job)
    assert result.status == "failed"
    assert "--device cpu" in result.reason
    tiles = read_features(job["output"] / "a.h5")
    assert tiles.slide_embedding is None
    [result] = embed(**job)
    assert result.status == "done"
    both = read_features(job["output"] / "a.h5")
    assert both.slide_embedding is not None
    np.testing.assert_array_equal(both.features, tiles.features)


@pytest.mark.slow
def test_two_processes_on_one_folder_share_the_work(job: dict[str, Any], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    embed(**job | {"output": alone})
    processes = [Command(command(job)) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    rows = summary(job["output"])
    assert {name: row["status"] for name, row in rows.items()} == {"a": "done", "b": "done", "c": "done"}
    for name in "abc":
        assert content(job["output"] / f"{name}.h5") == content(alone / f"{name}.h5")


def test_a_slide_another_process_works_on_is_skipped(job: dict[str, Any], slides: Path) -> None:
    job["output"].mkdir()
    lock = claim(job["output"], "b")
    assert lock is not None
    results = {result.slide_id: result for result in embed(**job)}
    lock.release()
    assert {name: result.status for name, result in results.items()} == {"a": "done", "b": "skipped", "c": "done"}
    assert "another process" in results["b"].reason


def test_a_full_disk_fails_the_slide_before_the_work(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    results = embed(**job)
    assert {result.status for result in results} == {"failed"}
    assert all("the disk is full" in result.reason for result in results)
    assert not list(job["output"].glob("*.h5"))


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file of this process may grow beyond 50 kB, as on a disk that is full."""
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, action)


def test_a_disk_that_is_full_in_the_middle_is_one_line_and_leaves_nothing_half_written(
    job: dict[str, Any], slides: Path, little_room: None
) -> None:
    [result] = embed(**job | {"slides": [slides / "a.svs"]})
    assert result.status == "failed"
    assert "a.jpg: cannot write it" in result.reason
    written = {path.name for path in job["output"].rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert written == {"summary.csv", "index.html"}, "the summary and the contact sheet, which are small"


def test_a_summary_that_cannot_be_written_is_said_and_ends_nothing(
    job: dict[str, Any], slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (job["output"] / "summary.csv").mkdir(parents=True)
    [result] = embed(**job | {"slides": [slides / "a.svs"]})
    assert result.status == "done"
    assert "summary.csv: cannot write it" in capsys.readouterr().err


def test_a_truncated_feature_file_is_named_and_replaced_on_request(job: dict[str, Any], slides: Path) -> None:
    job |= {"slides": [slides / "a.svs"]}
    embed(**job)
    path = job["output"] / "a.h5"
    whole = content(path)
    path.write_bytes(path.read_bytes()[:3000])
    [result] = embed(**job)
    assert result.status == "failed"
    assert "a.h5" in result.reason
    assert "truncated" in result.reason
    [result] = embed(**job, overwrite=True)
    assert result.status == "done"
    assert content(path) == whole


def test_a_mask_and_mpp_of_the_table_are_used(job: dict[str, Any], tmp_path: Path) -> None:
    write_synthetic_slide(tmp_path / "slide.tif", size=(1536, 1024), mpp=None)
    mask = np.zeros((64, 96), np.uint8)
    mask[16:32, 24:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "cohort.csv").write_text("slide,slide_id,mpp,tissue_mask\nslide.tif,patient 1 slide 1,0.5,mask.png\n")
    [result] = embed(**job | {"slides": [tmp_path / "cohort.csv"]})
    assert (result.status, result.slide_id, result.mpp_source) == ("done", "patient 1 slide 1", "option")
    features = read_features(job["output"] / "patient 1 slide 1.h5")
    assert (features.tissue_method or "").startswith("mask:mask.png:")
    assert features.coords.min(0).tolist() == [384, 256]
    assert (features.coords.max(0) + 64).tolist() == [768, 512]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tile_encoder": "uni2h"}, "uni2-h"),
        ({"tile_encoder": "nowhere.yaml"}, "nowhere.yaml"),
        ({"slide_encoder": "gigapth", "slide_checkpoint": "random"}, "gigapath"),
        ({"slide_encoder": "gigapath"}, "read tile embeddings of 'gigapath'"),
        ({"tile_checkpoint": "missing.pth"}, "missing.pth"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "gpu"}, "gpu"),
        ({"tile_px": 4}, "--tile-px"),
        ({"overlap": 64}, "--overlap 64 must be less than --tile-px 64"),
        ({"tile_px": 0}, "--tile-px"),
        ({"tile_mpp": 0.0}, "--tile-mpp"),
        ({"slide_mpp": 250.0}, "--slide-mpp 250 is not plausible"),
        ({"threads": 0}, "--threads"),
        ({"max_bad_tiles": -1}, "--max-bad-tiles"),
        ({"min_tissue": 2.0}, "--min-tissue"),
        ({"tile_mpp": -1.0}, "--tile-mpp"),
        ({"batch_size": 0}, "--batch-size"),
        ({"slides": ["missing.svs"]}, "missing.svs"),
    ],
)
def test_wrong_usage_is_one_line_before_any_slide_is_touched(
    job: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(LongslideError) as caught:
        embed(**job | change)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(job["output"].glob("*.h5")) if job["output"].exists() else True


def test_an_output_that_cannot_be_written_is_named(job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LongslideError, match="cannot write to the output folder"):
        embed(**job | {"output": tmp_path / "file" / "features"})


def test_more_unreadable_tiles_than_allowed_fail_the_slide_and_fewer_are_left_out(
    job: dict[str, Any], slides: Path, tmp_path: Path
) -> None:
    import tifffile

    broken = tmp_path / "broken.svs"
    shutil.copy(slides / "a.svs", broken)
    with open_slide(broken) as slide:
        from longslide.data.tissue.optical_density import find_tissue

        tissue = find_tissue(slide)
    row, column = np.argwhere(tissue.mask)[tissue.mask.sum() // 2]
    x, y = int(column * tissue.downsample[0]), int(row * tissue.downsample[1])
    with tifffile.TiffFile(broken) as file:
        page = file.pages[0]
        number = (y // 256) * -(-1536 // 256) + x // 256
        offset, count = page.dataoffsets[number], page.databytecounts[number]
    with broken.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * count)
    [result] = embed(**job | {"slides": [broken]})
    assert result.status == "failed"
    assert "--max-bad-tiles" in result.reason
    [result] = embed(**job | {"slides": [broken]}, max_bad_tiles=16)
    assert result.status == "done"
    assert result.bad_tiles
    assert 0 < result.bad_tiles <= 16
    [again] = embed(**job | {"slides": [broken]}, max_bad_tiles=16)
    assert (again.reason, again.bad_tiles) == ("already complete", result.bad_tiles)
    with pytest.raises(LongslideError, match="more unreadable tiles than --max-bad-tiles 0"):
        embed(**job | {"slides": [broken]})
    coords = read_features(result.features or "").coords
    inside = (coords // 256 == [x // 256, y // 256]).all(1)
    assert not inside.any(), "no tile of the unreadable region"


def test_a_damaged_reduced_level_is_a_remark_in_the_row(job: dict[str, Any], tmp_path: Path) -> None:
    path = write_synthetic_slide(tmp_path / "x.svs", size=(2048, 1536))
    with tifffile.TiffFile(path) as file:
        page = file.pages[2]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with path.open("r+b") as raw:
        for offset, count in places:
            raw.seek(offset)
            raw.write(b"\xff" * count)
    for _ in range(2):  # also when it was there already
        [result] = embed(**job | {"slides": [path]})
        assert result.status == "done"
        assert "level 2 unreadable" in result.reason
    assert "level 2 unreadable" in summary(job["output"])["x"]["reason"]
