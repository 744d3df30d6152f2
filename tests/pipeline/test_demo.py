"""The demo does the whole job, and says what is random about it."""

import subprocess
import sys
from pathlib import Path

import pytest
from longslide import read_features
from longslide.pipeline.demo import demo


def test_the_demo_makes_slides_embeds_them_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        sys.executable,
        "-m",
        "longslide.pipeline.cli",
        "demo",
        "--output",
        str(tmp_path / "demo"),
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout
    assert "4 done, 0 failed, 0 skipped" in done.stdout
    assert "longslide embed your-slides/" in done.stdout
    files = sorted((tmp_path / "demo" / "features").glob("*.h5"))
    assert [file.stem for file in files] == ["glandular-1", "glandular-2", "solid-1", "solid-2"]
    for file in files:
        features = read_features(file)
        assert len(features.coords) > 20
        assert features.slide_embedding is not None
        assert (tmp_path / "demo" / "features" / "qc" / f"{file.stem}.jpg").stat().st_size > 10_000
    demo(tmp_path / "demo", device="cpu")
    assert capsys.readouterr().err.count("was there already") == 4
