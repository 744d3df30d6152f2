"""Damaged slides in a batch: each ends done with equal tiles or failed in one line, in time and memory; none ends the batch.

    python benchmarks/damaged_slides.py [--count 1000] [--jobs 8] [--seed 0] [--keep FOLDER] [--list]

Seeded mutations of the header, the directory (TIFF) or data set (DICOM) and the tile data of slides are embedded by
`longslide embed`, 25 to a command, as one folder with an intact slide at its end: JPEG (Aperio and generic), deflate, LZW
and JPEG 2000 TIFFs, with LONGSLIDE_TEST_SLIDES a real SVS, with LONGSLIDE_TEST_CASES a DICOM series. Of slides that are
`done` embeddings and coordinates are compared with those of the intact slide.

Uncompressed pixels, LZW, JPEG and JPEG 2000 have no checksum: bytes of tile data may become others that decode to other
pixels without an error or a warning, which no reader can tell. Such slides are counted by their mutation as `other pixels`,
also where the tissue of what is shown has fewer tiles. Tiles are `lost` where a slide that is done lacks one which it shows
as the intact one does, or as background; `said` where a remark tells of native tiles without bytes, which Aperio's scanners
write on glass. The exit status is 1 where a command ended early, a slide took more than 60 s, a command and its processes
more than 4 GB, a reason more than a line, or tiles were lost without a word.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from longslide import Features, LongslideError, open_slide, read_features, write_synthetic_slide

SECONDS, MEMORY = 60.0, 4e9
A_COMMAND = 25

ENCODER = """
name: tiny
architecture: vit_tiny_patch16_224
timm_args: {img_size: 32, depth: 2, embed_dim: 48, num_heads: 3}
dim: 48
resize: 32
interpolation: bicubic
crop: 32
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
pooling: cls
precision: float32
tile_mpp: 0.5
tile_px: 224
licence: none
gated: false
paper: none
hub_id: null
"""

SIZE = (896, 672)
APERIO = f"Aperio Image Library v12.0.0\r\n{SIZE[0]}x{SIZE[1]}|AppMag = 20|MPP = 0.5"


def write(path: Path, levels: list[np.ndarray], compression: str) -> None:
    """A pyramid of native tiles of 224 or 240 px; `.svs` is Aperio's."""
    aperio = path.suffix == ".svs"
    tile = 240 if aperio else 224
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            how: dict[str, Any] = {
                "tile": (tile, tile),
                "resolution": (20_000, 20_000),
                "resolutionunit": "CENTIMETER",
                "subfiletype": int(number > 0 and not aperio),
                "description": APERIO if aperio else None,
                "metadata": None,
            }
            if compression != "jpeg":
                file.write(level, photometric="rgb", compression=compression, **how)
                continue
            padded = np.pad(level, ((0, -level.shape[0] % tile), (0, -level.shape[1] % tile), (0, 0)), mode="edge")
            tiles = (
                np.ascontiguousarray(padded[y : y + tile, x : x + tile])
                for y in range(0, padded.shape[0], tile)
                for x in range(0, padded.shape[1], tile)
            )
            streams = (simplejpeg.encode_jpeg(one, quality=80, colorsubsampling="420") for one in tiles)
            how |= {"shape": level.shape, "dtype": "uint8", "subsampling": (2, 2)}
            file.write(streams, photometric="ycbcr", compression="jpeg", **how)


Regions = dict[str, list[tuple[int, int]]]
"""Header, directory and data of a file, each as spans of bytes."""


def regions_of_tiff(path: Path) -> Regions:
    """Where header, directories with their arrays, and tiles are."""
    directory, data = [], []
    with tifffile.TiffFile(path) as tiff:
        for page in tiff.pages:
            assert isinstance(page, tifffile.TiffPage)
            directory.append((page.offset, page.offset + 2 + 12 * len(page.tags)))
            for name in ("TileOffsets", "TileByteCounts", "StripOffsets", "StripByteCounts", "JPEGTables"):
                if name in page.tags and page.tags[name].valueoffset:
                    start = page.tags[name].valueoffset
                    directory.append((start, start + page.tags[name].valuebytecount))
            if page.is_tiled:  # the levels; not thumbnail, label and macro, which nothing here reads
                data += [(a, a + n) for a, n in zip(page.dataoffsets, page.databytecounts, strict=True) if n]
    return {"header": [(0, 16)], "directory": directory, "data": data}


def regions_of_dicom(path: Path) -> Regions:
    """Where preamble and meta data, the data set, and the pixel data are."""
    content = path.read_bytes()
    pixels = content.find(b"\xe0\x7f\x10\x00")  # the tag of PixelData, little endian
    pixels = pixels if pixels > 0 else len(content) // 2
    return {"header": [(120, 400)], "directory": [(400, pixels)], "data": [(pixels, len(content))]}


def mutate(content: bytearray, regions: Regions, rng: np.random.Generator) -> str:
    """Damage a file in one place; says how."""
    where = str(rng.choice(["header", "directory", "data"], p=[0.2, 0.4, 0.4]))
    spans = regions[where]
    start, end = spans[rng.integers(len(spans))]
    place = int(rng.integers(start, max(start + 1, end)))
    if where == "data":
        how = str(rng.choice(["bytes", "zeros", "noise", "cut", "truncated"]))
        size = int(2 ** rng.uniform(4, 16))
        if how == "bytes":
            for _ in range(int(rng.integers(1, 9))):
                content[int(rng.integers(start, end))] ^= int(rng.integers(1, 256))
        elif how == "zeros":
            content[place : place + size] = bytes(len(content[place : place + size]))
        elif how == "noise":
            content[place : place + size] = rng.bytes(len(content[place : place + size]))
        elif how == "cut":
            del content[place : place + size]
        else:
            del content[place:]
    else:
        how = str(rng.choice(["bytes", "ones", "zeros"]))
        size = int(rng.integers(1, 9))
        part = content[place : place + size]
        content[place : place + size] = {
            "bytes": rng.bytes(len(part)),
            "ones": b"\xff" * len(part),
            "zeros": bytes(len(part)),
        }[how]
    return f"{where}, {how}"


def make_whole(folder: Path) -> list[Path]:
    """The slides before they are damaged: files, and a folder for a series."""
    folder.mkdir()
    with open_slide(write_synthetic_slide(folder / "drawn.tif", size=SIZE, seed=1)) as slide:
        image = slide.read_region(0, 0, 0, *SIZE)
    (folder / "drawn.tif").unlink()
    levels = [image, np.ascontiguousarray(image[::2, ::2])]
    kinds = {"aperio.svs": "jpeg", "jpeg.tif": "jpeg", "deflate.tif": "zlib", "lzw.tif": "lzw", "j2k.tif": "jpeg2000"}
    for name, compression in kinds.items():
        write(folder / name, levels, compression)
    slides = [folder / name for name in kinds]
    cases = Path(os.environ.get("LONGSLIDE_TEST_CASES", "")) / "dicom_two_series"
    if os.environ.get("LONGSLIDE_TEST_CASES") and cases.is_dir():
        series = folder / "dicom"
        series.mkdir()
        for file in cases.glob("s1_*.dcm"):
            shutil.copyfile(file, series / file.name)
        slides.append(series)
    real = Path(os.environ.get("LONGSLIDE_TEST_SLIDES", "")) / "CMU-1-Small-Region.svs"
    if real.is_file():
        slides.append(shutil.copyfile(real, folder / "real.svs"))
    return slides


@dataclass
class Damaged:
    """A damaged slide.

    Attributes:
        name: Its name in the folder of its command.
        kind: The intact slide.
        how: What was done to it.
        outcomes: How its slides ended.
        reasons: Why they failed.
    """

    name: str
    kind: str
    how: str
    outcomes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def write_damaged(number: int, seed: int, folder: Path, whole: list[Path]) -> Damaged:
    """Write the damaged slide of a number; the kinds take turns."""
    rng = np.random.default_rng([seed, number])
    source = whole[number % len(whole)]
    name = f"{source.stem}_{number:04d}"
    if source.is_dir():
        shutil.copytree(source, folder / name)
        files = sorted((folder / name).iterdir())
        victim = files[rng.integers(len(files))]
        regions = regions_of_dicom(victim)
    else:
        victim = shutil.copyfile(source, folder / f"{name}{source.suffix}")
        regions = regions_of_tiff(victim)
    content = bytearray(victim.read_bytes())
    how = mutate(content, regions, rng)
    victim.write_bytes(content)
    return Damaged(name, source.stem, how)


def memory_of(process: int) -> int:
    """Bytes that a process and those below it hold, shared pages once (proportional set size)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            while pid > 1 and pid != process:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if pid == process:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, ValueError, IndexError):
            continue
    return total


@dataclass
class Command:
    """How a command ended.

    Attributes:
        status: Its exit status.
        slowest: Seconds between two of its lines, at most: no slide took longer.
        memory: Bytes that it held at most.
        errors: What it said beside the lines of slides.
    """

    status: int
    slowest: float
    memory: int
    errors: list[str]


def run(words: list[str]) -> Command:
    """Run `longslide embed`, and watch its memory and its lines."""
    peak, slowest, errors = 0, 0.0, []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.2):
                peak = max(peak, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.stderr is not None
        last = None
        for line in process.stderr:
            if line.startswith("[") and "/" in line[:10]:
                now = time.monotonic()
                slowest = max(slowest, now - last if last else 0.0)
                last = now
            elif "Traceback" in line or line.startswith("longslide"):
                errors.append(line.strip())
            last = last or time.monotonic()
        ended.set()
        watcher.join()
    return Command(process.returncode, slowest, peak, errors)


def all_changed(places: list[tuple[int, int]], ours: Features, theirs: Features) -> bool:
    """Whether a damaged slide shows something at all of these tiles, and not what the intact one shows."""
    size = ours.tile_size_level0 or 1
    with open_slide(ours.slide.path or "") as damaged, open_slide(theirs.slide.path or "") as whole:
        for x, y in places:
            try:
                shown, expected = (one.read_region(x, y, 0, size, size) for one in (damaged, whole))
            except LongslideError:
                return False
            if np.array_equal(shown, expected) or (shown == np.array(damaged.background, np.uint8)).all():
                return False
    return True


def outcome(row: dict[str, str], intact: dict[str, Path], kind: str) -> str:
    """How a slide ended, held against the intact one."""
    if row["status"] != "done":
        return row["status"]
    ours, theirs = read_features(row["features"]), read_features(intact[kind])
    places = {place: number for number, place in enumerate(map(tuple, theirs.coords.tolist()))}
    if len(ours.coords) + int(row["bad_tiles"] or 0) < len(places):
        if "without bytes" in row["reason"]:
            return "done, tiles lost, said"
        lost = sorted(set(places) - set(map(tuple, ours.coords.tolist())))
        return "done, other pixels" if all_changed(lost, ours, theirs) else "done, tiles lost"
    common = [(i, places[one]) for i, one in enumerate(map(tuple, ours.coords.tolist())) if one in places]
    rows, others = np.array(common, int).reshape(-1, 2).T
    equal = np.allclose(ours.features[rows], theirs.features[others], atol=1e-3)
    return "done" if equal and len(common) == len(places) else "done, other pixels"


def main() -> int:
    """Run the benchmark; 1 if something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the damaged files and what came of them")
    parser.add_argument("--list", action="store_true", help="list each damaged slide with its end")
    options = parser.parse_args()
    home = options.keep or Path(tempfile.mkdtemp(prefix="damaged-"))
    home.mkdir(parents=True, exist_ok=True)
    try:
        return benchmark(options, home)
    finally:
        if options.keep is None:
            shutil.rmtree(home, ignore_errors=True)


def benchmark(options: argparse.Namespace, home: Path) -> int:
    """Damage, embed, compare, print."""
    began = time.monotonic()
    encoder = home / "tiny.yaml"
    encoder.write_text(ENCODER)

    def words(folder: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "longslide", "embed", str(folder), "--output", f"{folder}_out", "--device", "cpu"),
            *("--tile-encoder", str(encoder), "--tile-checkpoint", "random", "--threads", "1"),
            *("--slide-timeout", f"{SECONDS - 5:g}", "--id-from", "path"),
        ]

    whole = make_whole(home / "intact")
    first = run(words(home / "intact"))
    intact = {path.stem: home / "intact_out" / f"{path.stem}.h5" for path in whole}
    if first.status:
        print(f"the intact slides cannot be embedded: {first.errors}")
        return 1

    def one_command(start: int) -> tuple[Command, list[Damaged], bool]:
        folder = home / f"from_{start:04d}"
        folder.mkdir(exist_ok=True)
        numbers = range(start, min(start + A_COMMAND, options.count))
        damaged = [write_damaged(number, options.seed, folder, whole) for number in numbers]
        shutil.copyfile(whole[0], folder / "zz_intact.svs")
        ended = run(words(folder))
        rows = []
        if (Path(f"{folder}_out") / "summary.csv").is_file():
            with (Path(f"{folder}_out") / "summary.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        for one in damaged:
            for row in rows:
                if one.name in Path(row["slide"]).parts or Path(row["slide"]).stem == one.name:
                    one.outcomes.append(outcome(row, intact, one.kind))
                    one.reasons += [row["reason"]] if row["status"] != "done" else []
        last = next((row for row in rows if row["slide_id"] == "zz_intact"), None)
        equal = last is not None and outcome(last, intact, whole[0].stem) == "done"
        if options.keep is None:
            shutil.rmtree(folder)
            shutil.rmtree(f"{folder}_out", ignore_errors=True)
        return ended, damaged, equal

    with ThreadPoolExecutor(options.jobs) as executor:
        results = list(executor.map(one_command, range(0, options.count, A_COMMAND)))
    return report(results, options, time.monotonic() - began)


def report(results: list[tuple[Command, list[Damaged], bool]], options: argparse.Namespace, seconds: float) -> int:
    """Print what came out; 1 if something is not as it must be."""
    damaged = [one for _, group, _ in results for one in group]
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for one in damaged:
        for end in one.outcomes or ["nothing said"]:
            table[f"{one.kind}: {one.how}"][end] += 1
    ends = sorted({end for counts in table.values() for end in counts})
    print(f"{'':30}" + "".join(f"{end:>20}" for end in ends))
    for how in sorted(table):
        print(f"{how:30}" + "".join(f"{table[how][end] or '':>20}" for end in ends))
    total = sum((Counter(counts) for counts in table.values()), Counter())
    print(f"{'all':30}" + "".join(f"{total[end]:>20}" for end in ends))
    if options.list:
        for one in damaged:
            print(f"{one.name} ({one.how}): {', '.join(one.outcomes)} {'; '.join(one.reasons)[:200]}")
    unexpected = [reason for one in damaged for reason in one.reasons if reason.startswith("unexpected")]
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("every slide has an end", lambda: all(one.outcomes for one in damaged)),
        (
            "the intact slide at the end of each command is done and equal",
            lambda: all(equal for _, _, equal in results),
        ),
        ("every command ends with status 0 or 1", lambda: all(ended.status in (0, 1) for ended, _, _ in results)),
        ("no traceback", lambda: not any(ended.errors for ended, _, _ in results) and not unexpected),
        ("reasons of one line", lambda: not any("\n" in reason for one in damaged for reason in one.reasons)),
        (f"at most {SECONDS:g} s a slide", lambda: max(ended.slowest for ended, _, _ in results) <= SECONDS),
        (f"at most {MEMORY / 1e9:g} GB a command", lambda: max(ended.memory for ended, _, _ in results) <= MEMORY),
        ("no tiles lost without a word", lambda: not total["done, tiles lost"]),
    ]
    held = [check() for _, check in checks]
    for (name, _), ok in zip(checks, held, strict=True):
        print(f"{'held  ' if ok else 'BROKEN'}  {name}")
    for text in [*unexpected[:5], *(line for ended, _, _ in results for line in ended.errors[:1])][:10]:
        print(f"        {text[:200]}")
    if others := total["done, other pixels"]:
        print(
            f"{others} done with other pixels: their bytes decode without an error or a warning, and have no checksum"
        )
    slowest, peak = max(ended.slowest for ended, _, _ in results), max(ended.memory for ended, _, _ in results)
    print(
        f"{len(damaged)} damaged slides in {seconds:.0f} s, {options.jobs} commands at once; at most {slowest:.1f} s a "
        f"slide, {peak / 1e9:.2f} GB a command; seed {options.seed}"
    )
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
