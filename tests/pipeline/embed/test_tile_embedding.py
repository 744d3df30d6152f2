"""Tiles of many slides go through the encoder as one stream, and each slide gets its own embeddings or its own error."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_files import ENCODER
from longslide import LongslideError, create_tile_encoder, open_slide, write_synthetic_slide
from longslide.data.slides.slide import Slide
from longslide.data.tiles.grid import make_grid
from longslide.data.tiles.readers import TileReaders
from longslide.data.tiles.stream import TileStream
from longslide.data.tissue.base import Tissue
from longslide.models.tile_encoder.encoder import TileEncoder
from longslide.pipeline.embed.tile_embedding import EmbeddedTiles, TileEmbedder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TileEncoder:
    path = tmp_path_factory.mktemp("encoder") / "tiny.yaml"
    path.write_text(ENCODER)
    return create_tile_encoder(path, checkpoint="random")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Slide]]:
    folder = tmp_path_factory.mktemp("slides")
    paths = [write_synthetic_slide(folder / f"{seed}.svs", size=(1024, 768), seed=seed) for seed in range(3)]
    opened = [open_slide(path) for path in paths]
    yield opened
    for slide in opened:
        slide.close()


def stream(slide: Slide, tiles: int = 10, **options: Any) -> TileStream:
    width, height = slide.dimensions
    everywhere = Tissue(np.ones((height // 64, width // 64), bool), (64, 64), "all")
    grid = make_grid(slide, everywhere, tile_mpp=0.5, tile_px=64)
    assert len(grid.coords) >= tiles
    return TileStream(slide, replace(grid, coords=grid.coords[:tiles]), batch_size=4, **options)


def one_by_one(encoder: TileEncoder, stream: TileStream) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([encoder(torch.from_numpy(batch.tiles)).numpy() for batch in stream])


def embeddings(found: EmbeddedTiles | Exception | None) -> np.ndarray:
    assert isinstance(found, EmbeddedTiles)
    return found.embeddings


def test_many_slides_give_what_each_gives_alone_in_their_order(encoder: TileEncoder, slides: list[Slide]) -> None:
    streams = [stream(slides[0], 10), None, stream(slides[1], 3), stream(slides[2], 25), stream(slides[0], 0)]
    seen: list[Any] = []
    with TileReaders(3) as readers:
        found = list(
            TileEmbedder(encoder, CPU, "float32")(
                enumerate(streams), readers, lambda key, tiles: seen.append((key, tiles)), seen.append
            )
        )
    assert [key for key, _ in found] == [0, 1, 2, 3, 4]
    for (_, embedded), one in zip(found, streams, strict=True):
        if one is None:
            assert embedded is None
        elif not len(one):
            assert embeddings(embedded).shape == (0, 0)
        else:
            np.testing.assert_allclose(embeddings(embedded), one_by_one(encoder, one), rtol=1e-5, atol=1e-6)
            assert isinstance(embedded, EmbeddedTiles)
            assert embedded.rows.tolist() == list(range(len(one)))
    assert [one for one in seen if isinstance(one, tuple)] == [(0, 10), (2, 3), (3, 25)]
    assert sum(one for one in seen if isinstance(one, int)) == 38


def test_a_slide_that_cannot_be_read_fails_alone(encoder: TileEncoder, slides: list[Slide], tmp_path: Path) -> None:
    path = write_synthetic_slide(tmp_path / "broken.svs", size=(1024, 768))
    broken = open_slide(path)
    with path.open("r+b") as file:  # what the tiles' offsets point at
        size = path.stat().st_size
        file.seek(size // 100)
        file.write(bytes(size * 9 // 10))
    streams = [stream(slides[0]), stream(broken), stream(slides[2])]
    with TileReaders(2) as readers, broken:
        found = [embedded for _, embedded in TileEmbedder(encoder, CPU, "float32")(enumerate(streams), readers)]
    assert isinstance(found[1], LongslideError)
    assert "broken.svs: 4 unreadable tiles" in str(found[1])
    for i in (0, 2):
        np.testing.assert_allclose(embeddings(found[i]), one_by_one(encoder, streams[i]), rtol=1e-5, atol=1e-6)


def test_an_error_of_the_encoder_ends_the_slides_whose_tiles_it_had_and_no_others(slides: list[Slide]) -> None:
    class Chokes(torch.nn.Module):
        calls = 0

        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                raise LongslideError("does not like these tiles")
            return tiles.float().mean((1, 2))

    streams = [stream(one) for one in slides]
    embedder = TileEmbedder(Chokes(), CPU, "float32")  # type: ignore[arg-type]
    with TileReaders(2) as readers:
        found = [embedded for _, embedded in embedder(enumerate(streams), readers)]
    assert isinstance(found[1], LongslideError)
    for i in (0, 2):
        wanted = np.concatenate([batch.tiles.mean((1, 2)) for batch in streams[i]])
        np.testing.assert_allclose(embeddings(found[i]), wanted, rtol=1e-4)


def test_a_slide_is_given_back_while_the_next_is_still_being_prepared(
    encoder: TileEncoder, slides: list[Slide]
) -> None:
    first_is_done = threading.Event()

    def prepared() -> Iterator[tuple[int, TileStream | None]]:
        yield 0, stream(slides[0])
        assert first_is_done.wait(60)
        yield 1, stream(slides[1])

    with TileReaders(2) as readers:
        keys = []
        for key, _ in TileEmbedder(encoder, CPU, "float32")(prepared(), readers):
            keys.append(key)
            first_is_done.set()
    assert keys == [0, 1]


def test_what_goes_wrong_in_preparing_is_raised_and_no_thread_is_left(
    encoder: TileEncoder, slides: list[Slide]
) -> None:
    def prepared() -> Iterator[tuple[int, TileStream | None]]:
        yield 0, stream(slides[0])
        raise KeyError("a mistake in the code")

    before = threading.active_count()
    with TileReaders(2) as readers, pytest.raises(KeyError, match="a mistake in the code"):
        list(TileEmbedder(encoder, CPU, "float32")(prepared(), readers))
    with TileReaders(2) as readers:
        given_up = TileEmbedder(encoder, CPU, "float32")(((i, stream(slides[0])) for i in range(100)), readers)
        next(given_up)
        given_up.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_out_of_memory_halves_the_batch_and_goes_on(encoder: TileEncoder, slides: list[Slide]) -> None:
    sizes = []

    def small_memory(module: Any, tiles: tuple[torch.Tensor]) -> None:
        sizes.append(len(tiles[0]))
        if len(tiles[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    one = stream(slides[0], 50)
    one.batch_size = 32
    wanted = one_by_one(encoder, one)
    hook = encoder.register_forward_pre_hook(small_memory)
    with TileReaders(1) as readers:
        ((_, found),) = TileEmbedder(encoder, CPU, "float32")([(0, one)], readers)
    np.testing.assert_allclose(embeddings(found), wanted, rtol=1e-4, atol=1e-5)
    assert sizes[:4] == [32, 16, 8, 4], "halved until it fits"
    assert max(sizes[4:]) == 4, "and never tried larger again"
    hook.remove()

    hook = encoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with TileReaders(1) as readers:
        ((_, found),) = TileEmbedder(encoder, CPU, "float32")([(0, one)], readers)
    hook.remove()
    assert "one tile does not fit" in str(found)


def test_embeddings_that_are_not_finite_fail_the_slide(encoder: TileEncoder, slides: list[Slide]) -> None:
    hook = encoder.register_forward_hook(lambda module, tiles, output: output * 1e30)
    with TileReaders(1) as readers:
        ((_, found),) = TileEmbedder(encoder, CPU, "bfloat16")([(0, stream(slides[0]))], readers)
    hook.remove()
    assert isinstance(found, LongslideError)
    assert "not finite in bfloat16; try --precision float32" in str(found)
