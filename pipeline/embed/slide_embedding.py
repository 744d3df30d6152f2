"""Slide embeddings from tile embeddings that exist: feature files of Longslide and of other tools."""

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...data.features.feature_file import read_features, write_features
from ...data.features.features import Features
from ...data.features.preprocessing import Preprocessing
from ...data.slides.slide_table import SlideEntry
from ...data.whole_file import remove_leftovers
from ...errors import LongslideError
from ...registry import is_factory
from ..batch.batch import run_batch
from ..batch.claims import claim
from ..batch.ledger import make_output_folder
from ..batch.memory import Turn
from ..batch.progress import Progress
from ..batch.rerun import MadeOtherwiseError, refuse_mistaken_rerun
from ..batch.result import SlideResult
from ..batch.shards import Shard
from .choices import SlideEncoderChoice
from .job import with_slide_encoder

if TYPE_CHECKING:
    import torch

    from ...models.slide_encoder.base import AnySlideEncoder
    from ...models.tile_encoder.engine import Precision

FEATURE_SUFFIXES = (".h5", ".hdf5")

WITHOUT_PRECISION = "float16"
"""Precision of the slide encoder on a GPU where the feature file states none: that of GigaPath's own code."""

AS_WIDE = 1.2
"""Ratio of two tiles' widths in microns up to which nothing is remarked: 224 and 256 px, 448 and 512."""


def embed_features(
    inputs: str | Path | Sequence[str | Path],
    output: Path,
    slide_encoder: SlideEncoderChoice | None,
    slide_checkpoint: str | Path | None,
    pool: Literal["mean", "cls"],
    device: str,
    precision: str,
    *,
    shard: str | None,
    seed: int,
    overwrite: bool,
    trust_remote_code: bool,
) -> list[SlideResult]:
    """Make slide embeddings from feature files; the arguments are those of `embed`.

    Raises:
        LongslideError: Wrong usage, found before any file is touched.
    """
    files = find_feature_files(inputs)
    if slide_encoder is None:
        raise LongslideError(
            "give --tile-encoder to embed slides, or --slide-encoder for slide embeddings of feature files"
        )

    from ...models.slide_encoder.base import load_slide_encoder
    from ...models.slide_encoder.spec import is_remote, load_slide_encoder_spec, reads_any
    from .tile_embedding import resolve_device, slide_encoder_on

    named = isinstance(slide_encoder, str | Path) and not is_factory(slide_encoder)
    pretrained_here = Path(slide_checkpoint or "").suffix == ".ckpt"
    reads, known = Readable(str(slide_encoder)), False
    remote = is_remote(slide_encoder)
    if named and not pretrained_here and not remote:
        spec = load_slide_encoder_spec(str(slide_encoder))
        known = not reads_any(spec, slide_checkpoint)
        if known:
            reads = Readable(spec.name, spec.tile_encoder, spec.tile_dim)
    width = reads.refuse_if_none_fits(files, output)
    make_output_folder(output)
    torch_device = resolve_device(device)
    encoder = load_slide_encoder(
        slide_encoder,
        checkpoint=slide_checkpoint,
        pool=pool,
        seed=seed,
        tile_encoder=None,
        tile_dim=width,
        trust_remote_code=trust_remote_code,
    )
    if not known:
        own_weights = named and not pretrained_here and not remote  # perhaps of other tile embeddings
        facts = getattr(encoder, "spec", None)
        reads = Readable(
            encoder.name, "" if own_weights else encoder.tile_encoder, None if facts is None else facts.tile_dim
        )
        reads.refuse_if_none_fits(files, output)
    encoder = slide_encoder_on(torch_device, encoder)
    job = SlideEmbeddingJob(output, encoder, reads, torch_device, precision, overwrite)
    entries = [SlideEntry(path, path.stem) for path in files]
    part = None if shard is None else Shard.of_slides(shard, entries)
    entries = entries if part is None else list(part.entries)
    if not overwrite:
        refuse_mistaken_rerun(entries, job.existing, output)
    return run_batch(job, entries, output, shard=part)


def find_feature_files(inputs: str | Path | Sequence[str | Path]) -> list[Path]:
    """The feature files of a job: those given, and those in folders, by path.

    Raises:
        LongslideError: There are none, or two would be written under one name.
    """
    files: list[Path] = []
    for item in map(Path, [inputs] if isinstance(inputs, str | Path) else inputs):
        if item.is_dir():
            found = [path for suffix in FEATURE_SUFFIXES for path in item.glob(f"*{suffix}") if path.is_file()]
            if not found:
                raise LongslideError(
                    f"{item}: no feature files (.h5) in this folder; slides are embedded with --tile-encoder"
                )
            files += sorted(found)
        elif item.suffix.lower() not in FEATURE_SUFFIXES:
            raise LongslideError(f"{item}: not a feature file (.h5); slides are embedded with --tile-encoder")
        else:
            files.append(item)
    first: dict[str, Path] = {}
    for path in files:
        if first.setdefault(path.stem.casefold(), path) is not path:
            raise LongslideError(f"two feature files of one name: {first[path.stem.casefold()]} and {path}")
    return files


@dataclass(frozen=True)
class Readable:
    """What a slide encoder reads.

    Attributes:
        name: The slide encoder.
        tile_encoder: The tile encoder whose embeddings it reads; empty for those of any.
        tile_dim: Their length; None for any.
    """

    name: str
    tile_encoder: str = ""
    tile_dim: int | None = None

    def check(self, path: Path, features: Features, output: Path) -> None:
        """Refuse a feature file that it cannot read, or that must not be rewritten.

        Raises:
            LongslideError: The embeddings are of another length or another tile encoder, or the file is another tool's and
                in the output folder.
        """
        width = features.features.shape[1]
        if self.tile_dim is not None and width != self.tile_dim:
            of = f" (those of {self.tile_encoder})" if self.tile_encoder else ""
            raise LongslideError(
                f"{path}: tile embeddings of length {width}, but slide encoder {self.name!r} reads {self.tile_dim}{of}"
            )
        # Other tools spell names otherwise: GigaPath, prov-gigapath, gigapath.
        if self.tile_encoder and features.encoder is not None and not _same_name(features.encoder, self.tile_encoder):
            raise LongslideError(
                f"{path}: tile embeddings of {features.encoder!r}, but slide encoder {self.name!r} reads those of "
                f"{self.tile_encoder!r}"
            )
        if features.layout != "longslide" and path.resolve().parent == output.resolve():
            raise LongslideError(
                f"{path}: a feature file of {features.layout}, which is left as it is; choose another --output"
            )

    def refuse_if_none_fits(self, files: Sequence[Path], output: Path) -> int:
        """The width of the tile embeddings, of the first file that can be read.

        Raises:
            LongslideError: None can; says why not the first.
        """
        why: LongslideError | None = None
        for path in files:
            try:
                features = read_features(path, embeddings=False)
                self.check(path, features, output)
                return int(features.features.shape[1])
            except LongslideError as error:
                why = why or error
        assert why is not None
        raise why


_OTHER_NAMES = {"conch": "conchv1", "univ1": "uni", "univ2": "uni2h"}
"""Names of other tools, without hyphens and the like, that differ from ours by more than these."""


def _same_name(one: str, other: str) -> bool:
    plain = [
        "".join(letter for letter in name.lower().removeprefix("prov") if letter.isalnum()) for name in (one, other)
    ]
    return _OTHER_NAMES.get(plain[0], plain[0]) == _OTHER_NAMES.get(plain[1], plain[1])


def unlike_recommended(made_with: Preprocessing, tile_encoder: str = "") -> str:
    """A remark on tiles that cover more or less than their tile encoder is meant for; empty where nothing is to be said.

    Args:
        made_with: What the tile embeddings were made with; what is not known is not remarked.
        tile_encoder: The tile encoder that they are taken for, where it is not known.
    """
    from ...models.tile_encoder.spec import list_tile_encoders, load_tile_encoder_spec

    said = made_with.tile_encoder or tile_encoder
    name = next((name for name in list_tile_encoders() if _same_name(said, name)), None)
    if name is None or made_with.tile_px is None or made_with.tile_mpp is None:
        return ""
    spec = load_tile_encoder_spec(name)
    if spec.tile_mpp is None:
        return ""
    ratio = made_with.tile_px * made_with.tile_mpp / (spec.tile_px * spec.tile_mpp)
    if 1 / AS_WIDE <= ratio <= AS_WIDE:
        return ""
    return (
        f"tiles of {made_with.tile_px} px at {made_with.tile_mpp:.3g} um/px (recommended for {name}: {spec.tile_px} px at "
        f"{spec.tile_mpp:g} um/px)"
    )


@dataclass(frozen=True)
class ReadTiles:
    """Tile embeddings that are claimed and wait for the slide encoder; `resources` frees them."""

    entry: SlideEntry
    features: Features
    resources: ExitStack
    started: float


@dataclass
class SlideEmbeddingJob:
    """Adds slide embeddings to feature files, or writes files that have them into another folder.

    Attributes:
        output: Where the feature files are written.
        slide_encoder: The slide encoder, on `device`.
        reads: What it reads.
        device: Where it runs.
        precision: In what precision; `auto` for that of the tile embeddings.
        overwrite: Whether slide embeddings that were made otherwise are replaced.
    """

    output: Path
    slide_encoder: "AnySlideEncoder"
    reads: Readable
    device: "torch.device"
    precision: str
    overwrite: bool

    @property
    def description(self) -> str:
        """What the job does, in a line."""
        encoder = self.slide_encoder
        return f"slide encoder {encoder.name} ({encoder.weights}); {self.device}"

    @property
    def made_with(self) -> dict[str, Any]:
        """What slide embeddings depend on."""
        return with_slide_encoder(Preprocessing(), self.slide_encoder).to_dict()

    def path(self, entry: SlideEntry) -> Path:
        """The feature file that is written."""
        return self.output / f"{entry.slide_id}.h5"

    def existing(self, entry: SlideEntry) -> Features | None:
        """The file in the output folder, if it has the slide embedding that is asked for.

        Raises:
            MadeOtherwiseError: It has another one, or is of other tile embeddings.
            LongslideError: It is broken.
        """
        path = self.path(entry)
        if not path.exists():
            return None
        in_place = path.samefile(entry.path)
        features = read_features(path, embeddings=not in_place)
        ways = []
        if not in_place:
            source = read_features(entry.path)
            if not (
                np.array_equal(source.features, features.features) and np.array_equal(source.coords, features.coords)
            ):
                ways.append("of other tile embeddings")
        if features.slide_embedding is not None:
            made_with = Preprocessing.of(features)
            ways += [str(one) for one in made_with.differences(with_slide_encoder(made_with, self.slide_encoder))]
        if ways:
            raise MadeOtherwiseError(path, ways)
        return features if features.slide_embedding is not None else None

    def prepare(self, entry: SlideEntry, turn: Turn) -> ReadTiles | SlideResult:
        """Claim and read the tile embeddings, and see what exists."""
        started = time.monotonic()
        with ExitStack() as resources:
            resources.callback(claim(self.output, entry.slide_id).release)
            if not self.overwrite and (existing := self.existing(entry)) is not None:
                return SlideResult.done(_entry_of(entry, existing), existing, self.path(entry), "already complete")
            features = read_features(entry.path)
            self.reads.check(entry.path, features, self.output)
            if not len(features.features):
                return SlideResult.skipped(entry, "no tiles")
            remove_leftovers(self.path(entry))
            return ReadTiles(_entry_of(entry, features), features, resources.pop_all(), started)

    def encode(
        self, slides: Generator[ReadTiles | SlideResult], progress: Progress
    ) -> Generator[ReadTiles | SlideResult]:
        """Nothing: the tiles have been embedded."""
        return slides

    def finish(self, prepared: ReadTiles, progress: Progress) -> SlideResult:
        """Embed the slide, and write the file."""
        from .tile_embedding import embed_slide

        entry, features = prepared.entry, prepared.features
        progress.slide_started(entry.slide_id, len(features.features))
        made = embed_slide(self.slide_encoder, features, self.device, self._precision(features))
        if features.layout != "longslide":
            made = replace(made, layout="longslide", settings={**features.settings, "made_from": features.layout})
        remarks = [unlike_recommended(Preprocessing.of(features), self.reads.tile_encoder)]
        if features.encoder is None and self.reads.tile_encoder:
            remarks.append(f"the feature file does not say its tile encoder; taken for {self.reads.tile_encoder}")
        write_features(self.path(entry), made)
        return SlideResult.done(
            entry, made, self.path(entry), "; ".join(filter(None, remarks)), time.monotonic() - prepared.started
        )

    def stop(self) -> None:
        """Nothing to end: a feature file is read at once."""

    def _precision(self, features: Features) -> "Precision":
        from .tile_embedding import resolve_precision

        return resolve_precision(self.precision, features.precision or WITHOUT_PRECISION, self.device)


def _entry_of(entry: SlideEntry, features: Features) -> SlideEntry:
    """The slide, where the feature file says which it is."""
    return SlideEntry(Path(features.slide_path or entry.path), entry.slide_id)
