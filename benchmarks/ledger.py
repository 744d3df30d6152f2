"""What the bookkeeping of a job of a million slides takes on this machine's disk.

    python benchmarks/ledger.py [--slides 1000000] [--folder /shared/scratch]

Times are of one process alone, by the clock and of its core: writing and reading `summary.csv`, dividing the list into
shards, sending it to a worker, claiming and releasing a slide, and writing a feature file.
"""

import argparse
import pickle
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from longslide.data.slides.slide_table import SlideEntry
from longslide.data.table import csv_of
from longslide.data.whole_file import write_whole
from longslide.pipeline.batch.claims import claim
from longslide.pipeline.batch.dispatch import Dispatch
from longslide.pipeline.batch.ledger import read_summary, record
from longslide.pipeline.batch.result import SlideResult
from longslide.pipeline.batch.shards import Shard, sizes_of


@contextmanager
def timed(what: str, per: int = 0) -> Iterator[None]:
    start, cpu = time.perf_counter(), time.process_time()
    yield
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    each = f"   {seconds / per * 1e6:8.1f} us each" if per else ""
    print(f"{what:60} {seconds:8.2f} s, {cpu:8.2f} s of a core{each}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "a.svs").write_bytes(b"0")
        # All are one file: what is measured is the bookkeeping, not the file system of the slides.
        entries = [SlideEntry(folder / "a.svs", f"TCGA-AA-{number:07}-01Z-00-DX1") for number in range(options.slides)]
        results = [
            SlideResult(
                entry.slide_id, str(entry.path), "done", tiles=10000, bad_tiles=0, blurred_tiles=0, slide_mpp=0.2527,
                mpp_source="file", tile_mpp=0.5, tissue_mm2=210.5, left_out_mm2=1.5, blur=0.21, seconds=58.3,
                features=str(folder / f"{entry.slide_id}.h5"),
            )
            for entry in entries
        ]  # fmt: skip
        columns = [field.name for field in fields(SlideResult)]
        with timed("summary.csv, written whole"):
            write_whole(folder / "summary.csv", csv_of(columns, (asdict(one) for one in results)))
        print(f"{'summary.csv':60} {(folder / 'summary.csv').stat().st_size / 1e6:8.1f} MB")
        with timed("summary.csv, read"):
            read_summary(folder / "summary.csv")
        with timed("summary.csv, written with one more row"):
            record(folder, SlideResult("one more", "a.svs", "done", seconds=1.0))
        with timed("summary.csv, written with another one"):
            record(folder, SlideResult("another", "a.svs", "done", seconds=1.0))
        with timed("sizes of the slides (stat)", options.slides):
            sizes = sizes_of(entries)
        with timed("one shard of 16"):
            Shard.of_slides("3/16", entries)
        with timed("a list that deals slides out, made"):
            Dispatch(entries, sizes)
        with timed("the list of slides, pickled"):
            size = len(pickle.dumps(entries))
        print(f"{'the list of slides, pickled':60} {size / 1e6:8.1f} MB")
        with timed("a claim, taken and released", 1000):
            for number in range(1000):
                claim(folder, str(number)).release()
        with timed("a feature file of 10,000 tiles of 1,536 (31 MB), written", 10):
            content = memoryview(bytearray(10_000 * 1536 * 2))
            for number in range(10):
                write_whole(folder / f"{number}.h5", content)
        print(f"{'memory of this process':60} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:8.2f} GB")


if __name__ == "__main__":
    main()
