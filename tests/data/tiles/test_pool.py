"""Processes that read tiles: the threads' tiles, in order, and an end to whatever happens."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from longslide.data.slides.slide import Slide, open_slide
from longslide.data.synthetic import write_pyramid, write_synthetic_slide
from longslide.data.tiles.grid import Grid, make_grid
from longslide.data.tiles.pool import PendingTiles, TilePool
from longslide.data.tiles.readers import TileReaders
from longslide.data.tiles.stream import TileStream
from longslide.data.tissue.base import Tissue
from longslide.errors import LongslideError
from PIL import Image

pytestmark = pytest.mark.skipif(not TilePool.supported, reason="there is no pool of processes on this system")


def grid_of(slide: Slide, mpp: float = 0.5, tile_px: int = 64) -> Grid:
    everything = Tissue(np.ones((1, 1), bool), (float(slide.dimensions[0]), float(slide.dimensions[1])), "everything")
    return make_grid(slide, everything, tile_mpp=mpp, tile_px=tile_px, min_tissue=0.0)


def tiles_by_threads(slide: Slide, grid: Grid) -> np.ndarray:
    return np.concatenate([batch.tiles for batch in TileStream(slide, grid, threads=1)])


def tiles_by_pool(slide: Slide, grid: Grid, pool: TilePool, batch_size: int = 16) -> np.ndarray:
    tiles = []
    for batch in TileStream(slide, grid, batch_size=batch_size, read_ahead=2).read_by(pool):
        tiles.append(batch.tiles.copy())
        batch.release()
    return np.concatenate(tiles)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_slide(tmp_path_factory.mktemp("slides") / "a.svs", size=(1536, 1024), mpp=0.25)


@pytest.fixture(scope="module")
def pool() -> TilePool:
    with TilePool(2, batch_size=16, tile_px=64, batches=4) as pool:
        yield pool


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
@pytest.mark.parametrize("mpp", [0.25, 0.4, 0.5])
@pytest.mark.parametrize("batch_size", [5, 16])
def test_tiles_are_those_of_threads_in_the_grids_order(
    path: Path, pool: TilePool, reader: str, mpp: float, batch_size: int
) -> None:
    with open_slide(path, reader=reader) as slide:
        grid = grid_of(slide, mpp)
        stream = TileStream(slide, grid, batch_size=batch_size, read_ahead=2)
        tiles, index = [], []
        for batch in stream.read_by(pool):
            assert np.shares_memory(batch.tiles, pool.buffer)
            np.testing.assert_array_equal(batch.coords, grid.coords[batch.index])
            tiles.append(batch.tiles.copy())
            index.append(batch.index)
            batch.release()
        np.testing.assert_array_equal(np.concatenate(index), np.arange(len(grid.coords)))
        threads = TileStream(slide, grid, threads=1)
        np.testing.assert_array_equal(np.concatenate(tiles), np.concatenate([batch.tiles for batch in threads]))
        np.testing.assert_array_equal(stream.blur, threads.blur)


def test_batches_of_several_slides_may_be_under_way_at_once(tmp_path: Path, pool: TilePool) -> None:
    slides = [open_slide(write_synthetic_slide(tmp_path / f"{i}.svs", size=(640, 512), seed=i)) for i in range(5)]
    grids = [grid_of(slide) for slide in slides]
    expected = [tiles_by_threads(slide, grid)[:16] for slide, grid in zip(slides, grids, strict=True)]
    for _ in range(3):
        for first in range(0, 5, 3):
            chosen = range(first, min(first + 3, 5))
            pending = {i: pool.read(slides[i], grids[i], np.arange(16)) for i in chosen}
            for i in reversed(chosen):
                tiles, blur = pending[i].result(timeout=60)
                np.testing.assert_array_equal(tiles, expected[i])
                assert not np.isnan(blur).any()
                pending[i].release()
    for slide in slides:
        slide.close()


def damaged(path: Path) -> Path:
    write_pyramid(path, np.random.default_rng(0).integers(0, 200, (512, 512, 3), dtype=np.uint8), mpp=0.5)
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages.first.dataoffsets[0], file.pages.first.databytecounts[0]
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * count)
    return path


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_unreadable_tiles_are_counted_and_the_others_come(tmp_path: Path, pool: TilePool, reader: str) -> None:
    with open_slide(damaged(tmp_path / "a.tif"), reader=reader) as slide:
        grid = grid_of(slide)
        stream = TileStream(slide, grid, batch_size=16, read_ahead=2, max_bad_tiles=16)
        rows = []
        for batch in stream.read_by(pool):
            rows += batch.index.tolist()
            batch.release()
        assert len(stream.bad_tiles) == 16
        assert rows == np.flatnonzero((grid.coords >= 256).any(axis=1)).tolist()
        with pytest.raises(LongslideError, match="--max-bad-tiles 3"):
            list(TileStream(slide, grid, batch_size=16, read_ahead=2, max_bad_tiles=3).read_by(pool))
    assert len(tiles_of_whole(tmp_path, pool)) == 64  # and the pool has all its room


def tiles_of_whole(folder: Path, pool: TilePool) -> np.ndarray:
    with open_slide(write_synthetic_slide(folder / "whole.svs", size=(512, 512))) as slide:
        return tiles_by_pool(slide, grid_of(slide), pool)


def test_an_abandoned_stream_leaves_room(path: Path, pool: TilePool) -> None:
    with open_slide(path) as slide:
        grid = grid_of(slide)
        for _ in range(6):
            stream = TileStream(slide, grid, batch_size=16, read_ahead=2).read_by(pool)
            next(stream).release()
            del stream
        np.testing.assert_array_equal(tiles_by_pool(slide, grid, pool), tiles_by_threads(slide, grid))


def test_slides_are_read_by_processes_and_what_they_cannot_open_by_threads(tmp_path: Path, path: Path) -> None:
    Image.fromarray(np.full((256, 256, 3), 90, np.uint8)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", slide_mpp=0.5) as image, open_slide(path) as slide, TileReaders(5) as readers:
        grids = [grid_of(image), grid_of(slide)]
        by_threads = readers.read(image, grids[0], np.arange(4))
        by_processes = readers.read(slide, grids[1], np.arange(4))
        assert not isinstance(by_threads, PendingTiles)
        assert isinstance(by_processes, PendingTiles)
        assert (by_threads.result()[0] == 90).all()
        np.testing.assert_array_equal(by_processes.result()[0], tiles_by_threads(slide, grids[1])[:4])


def test_few_readers_are_threads_which_start_at_once(path: Path) -> None:
    with open_slide(path) as slide, TileReaders(4) as readers:
        assert not isinstance(readers.read(slide, grid_of(slide), np.arange(4)), PendingTiles)


def test_a_slide_that_is_gone_for_the_processes_is_an_error_that_names_it(tmp_path: Path, pool: TilePool) -> None:
    gone = write_synthetic_slide(tmp_path / "gone.svs", size=(512, 512))
    with open_slide(gone) as slide:
        gone.unlink()
        with pytest.raises(LongslideError, match=r"gone\.svs"):
            list(TileStream(slide, grid_of(slide), batch_size=16, read_ahead=2).read_by(pool))
    assert len(tiles_of_whole(tmp_path, pool)) == 64


def test_a_process_that_dies_costs_its_batch_and_is_replaced(path: Path) -> None:
    with TilePool(1, batch_size=16, tile_px=64, batches=3) as pool, open_slide(path) as slide:
        grid = grid_of(slide, 0.25)
        expected = tiles_by_threads(slide, grid)
        tiles_by_pool(slide, grid, pool)
        victim = pool._workers[0].process
        victim.send_signal(signal.SIGSTOP)
        pending = pool.read(slide, grid, np.arange(16))
        with pytest.raises(LongslideError, match=r"not read within 0\.1 s"):
            pending.result(timeout=0.1)
        victim.kill()
        with pytest.raises(LongslideError, match=r"a\.svs: .*crashed \(SIGKILL\)"):
            pending.result(timeout=60)
        pending.release()
        np.testing.assert_array_equal(tiles_by_pool(slide, grid, pool), expected)


def test_a_pool_that_is_closed_under_way_ends_at_once(path: Path) -> None:
    with open_slide(path) as slide:
        pool = TilePool(2, batch_size=16, tile_px=64, batches=3)
        pending = [pool.read(slide, grid_of(slide), np.arange(16)) for _ in range(3)]
        processes = [worker.process for worker in pool._workers]
        pool.close()
        assert all(process.poll() is not None for process in processes)
        with pytest.raises(LongslideError, match="stopped"):
            pool.read(slide, grid_of(slide), np.arange(16))
        assert len(pending) == 3


SCRIPT = """
import sys, time
import numpy as np
from longslide.data.slides.slide import open_slide
from longslide.data.tiles.pool import TilePool
from longslide.data.tiles.stream import TileStream
from longslide.data.tiles.grid import make_grid
from longslide.data.tissue.base import Tissue

with open_slide(sys.argv[1]) as slide, TilePool(2, batch_size=16, tile_px=64, batches=3) as pool:
    everything = Tissue(np.ones((1, 1), bool), tuple(map(float, slide.dimensions)), "everything")
    grid = make_grid(slide, everything, tile_mpp=0.25, tile_px=64, min_tissue=0.0)
    while True:  # without a guard for __main__: the script must not be run again by the processes
        for batch in TileStream(slide, grid, batch_size=16, read_ahead=1).read_by(pool):
            batch.release()
            print(*[worker.process.pid for worker in pool._workers], flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_a_job_that_is_ended(tmp_path: Path, path: Path, ending: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    job = subprocess.Popen(
        [sys.executable, str(script), str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert job.stdout is not None
    processes = [int(pid) for pid in job.stdout.readline().split()]
    assert len(processes) == 2
    assert all(map(alive, processes))
    if ending is signal.SIGINT:
        os.killpg(job.pid, ending)  # as a terminal does
    else:
        job.send_signal(ending)
    _, errors = job.communicate(timeout=30)
    deadline = time.monotonic() + 15
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, processes))
    assert errors.count("Traceback") <= 1  # the job's own, of Ctrl-C


def test_a_process_that_hangs_is_ended_when_the_time_is_over(path: Path) -> None:
    with TilePool(1, batch_size=16, tile_px=64) as pool, open_slide(path) as slide:
        grid = grid_of(slide)
        pool.read(slide, grid, np.arange(8)).result()
        (worker,) = pool._workers
        worker.process.send_signal(signal.SIGSTOP)
        with pytest.raises(LongslideError, match=r"not read within 0\.5 s"):
            list(TileStream(slide, grid, batch_size=16, timeout=0.5).read_by(pool))
        np.testing.assert_array_equal(tiles_by_pool(slide, grid, pool), tiles_by_threads(slide, grid))
        assert worker.process.poll() == -signal.SIGKILL


SLOW_READER = """
import os, time
from longslide.data.slides.tiled_tiff import TiledTiffReader

class SlowReader(TiledTiffReader):
    def __init__(self, path):
        super().__init__(path)
        self.ballast = os.urandom(2_000_000)  # as much as a slide of 100,000 native tiles

    def read_into(self, *place):
        if len(place[3]) == 64:  # a tile; what is read at opening, to compare, is not slow
            time.sleep(0.5)
        super().read_into(*place)
"""


def test_no_slide_is_waited_for_to_be_sent_to_a_process_that_reads_another(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_reader.py").write_text(SLOW_READER)
    monkeypatch.syspath_prepend(tmp_path)
    slow = "slow_reader.SlowReader"
    with (
        TilePool(1, batch_size=16, tile_px=64) as pool,
        open_slide(path, reader=slow) as slide,
        open_slide(path, reader=slow) as other,
        open_slide(path) as fast,
    ):
        grid = grid_of(slide)
        expected = tiles_by_threads(fast, grid)[:4]
        pool.read(slide, grid, np.arange(1)).result()
        started = time.monotonic()
        pending = [pool.read(slide, grid, np.arange(4)), pool.read(other, grid, np.arange(4))]
        assert time.monotonic() - started < 1
        for one in pending:
            np.testing.assert_array_equal(one.result()[0], expected)
        assert time.monotonic() - started > 4
