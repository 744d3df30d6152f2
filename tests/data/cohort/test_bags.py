"""Bags, augmentation, packing, the cache: what a batch holds, and that only seed, epoch and bag decide it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longslide.bag_lengths import are_parts, lengths_of
from longslide.data.cohort.augmentation import Augmentation
from longslide.data.cohort.bags import Bag, BagDataset, collate
from longslide.data.cohort.sampler import BagLoader, TokenBudgetBatchSampler
from longslide.data.features.cache import FeatureCache
from longslide.data.features.feature_file import read_features
from longslide.errors import LongslideError

EVERYTHING = Augmentation(tile_dropout=0.3, flip=True, rotate=True, crop=0.8, noise=0.1)
STD = np.ones(6, np.float32)


def bag(*files: Path, target: Any = 1) -> Bag:
    tiles = tuple(len(read_features(path, embeddings=False).features) for path in files)
    return Bag("p", tuple(path.stem for path in files), files, tiles, np.asarray(target))


def row_by_row(cells: torch.Tensor) -> bool:
    order = np.lexsort((cells[:, 0], cells[:, 1]))
    return bool((order == np.arange(len(cells))).all())


def identity(features: np.ndarray, original: np.ndarray) -> list[int]:
    """Which tile of the slide each row is."""
    return [int((original == row).all(1).argmax()) for row in np.asarray(features)]


def test_a_batch_is_the_bags_end_to_end(slide: Callable[..., Path]) -> None:
    a, b = slide("a", tiles=12, seed=1), slide("b", tiles=7, seed=2)
    batch = BagDataset([bag(a, target=0), bag(b, target=2)], FeatureCache())[[(0, 0, 0), (1, 0, 0)]]
    assert batch["tile_features"].dtype == torch.float16
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"].tolist() == [0, 12, 19]
    assert batch["grid_cells"].dtype == batch["index"].dtype == batch["target"].dtype == torch.int64
    assert batch["index"].tolist() == [0, 1]
    assert batch["target"].tolist() == [0, 2]
    assert "slide_embedding" not in batch
    for number, path in enumerate((a, b)):
        start, end = batch["cu_seqlens"][number], batch["cu_seqlens"][number + 1]
        file = read_features(path)
        np.testing.assert_array_equal(batch["tile_features"][start:end], file.features)
        np.testing.assert_array_equal(batch["grid_cells"][start:end], file.cells)


def test_of_slides_that_processes_share_a_batch_holds_the_own_tiles_alone(slide: Callable[..., Path]) -> None:
    bags = [bag(slide("a", tiles=12, seed=1)), bag(slide("b", tiles=1, seed=2))]
    keys = [(0, 3, 0), (1, 3, 0)]
    whole = BagDataset(bags, FeatureCache(), augmentation=EVERYTHING, feature_std=STD)[keys]
    halves = [
        BagDataset(bags, FeatureCache(), augmentation=EVERYTHING, feature_std=STD, part=part)[keys]
        for part in (lambda tiles: slice(0, tiles // 2), lambda tiles: slice(tiles // 2, tiles))
    ]
    assert [are_parts(batch["cu_seqlens"]) for batch in (whole, *halves)] == [False, True, True]
    for name in ("tile_features", "grid_cells"):
        [a, b], [c, d] = (torch.split(half[name], lengths_of(half["cu_seqlens"])) for half in halves)
        assert torch.equal(torch.cat([a, c, b, d]), whole[name])
    assert torch.equal(halves[1]["target"], whole["target"])


def test_targets_keep_the_shape_of_their_task(slide: Callable[..., Path]) -> None:
    path = slide("a")
    for target in (np.float32(0.5), np.array([1, np.nan, 0], np.float32), np.array([12, 1], np.float32)):
        batch = BagDataset([bag(path, target=target)] * 2, FeatureCache())[[(0, 0, 0), (1, 0, 0)]]
        assert batch["target"].dtype == torch.float32
        np.testing.assert_array_equal(batch["target"], np.stack([target, target]))


def test_precisions_may_be_mixed(slide: Callable[..., Path]) -> None:
    single = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    dataset = BagDataset([bag(slide("a")), bag(slide("b", features=single))], FeatureCache())
    assert dataset[[(0, 0, 0), (1, 0, 0)]]["tile_features"].dtype == torch.float32
    np.testing.assert_array_equal(dataset[1]["tile_features"], single)


def test_slides_of_a_patient_lie_side_by_side(slide: Callable[..., Path]) -> None:
    a, b = slide("a", tiles=12, seed=1), slide("b", tiles=7, seed=2)
    batch = BagDataset([bag(a, b)], FeatureCache())[0]
    cells = batch["grid_cells"]
    assert len(torch.unique(cells, dim=0)) == len(cells) == 19, "no two tiles in one cell"
    assert row_by_row(cells)
    # Each slide is whole and keeps its own arrangement.
    for path, left in ((a, 0), (b, 6)):
        file = read_features(path)
        inside = (cells[:, 0] >= left) & (cells[:, 0] < left + 5)
        np.testing.assert_array_equal(cells[inside] - torch.tensor([left, 0]), file.cells)
        np.testing.assert_array_equal(batch["tile_features"][inside], file.features)


@pytest.mark.parametrize("slides", [1, 2])
def test_augmented_tiles_are_tiles_of_the_slide_in_a_turned_grid(slides: int, slide: Callable[..., Path]) -> None:
    paths = [slide(name, tiles=17, seed=i) for i, name in enumerate("ab"[:slides])]
    originals = np.concatenate([read_features(path).features for path in paths])
    dataset = BagDataset([bag(*paths)], FeatureCache(), augmentation=Augmentation(0.25, flip=True, rotate=True))
    arrangements = set()
    for epoch in range(12):
        batch = dataset[[(0, epoch, 0)]]
        assert len(batch["tile_features"]) == 13 * slides == dataset.lengths[0]
        assert row_by_row(batch["grid_cells"])
        tiles = identity(batch["tile_features"].numpy(), originals)
        assert len(set(tiles)) == len(tiles)
        assert (batch["grid_cells"] >= 0).all()
        arrangements.add(tuple(tiles))
    assert len(arrangements) > 6


def test_flips_and_turns_keep_neighbours_neighbours() -> None:
    cells = np.array([(x + 3, y + 8) for y in range(3) for x in range(5) if (x, y) != (4, 0)])
    augmentation = Augmentation(flip=True, rotate=True)
    seen = set()
    for seed in range(60):
        moved = augmentation.move(cells, np.random.default_rng(seed))
        distances = np.abs(cells[:, None] - cells[None]).sum(-1)
        np.testing.assert_array_equal(np.abs(moved[:, None] - moved[None]).sum(-1), distances)
        assert moved.min(0).tolist() == [3, 8]
        seen.add(moved.tobytes())
    assert len(seen) == 8, "the eight symmetries of the square"


def test_a_crop_is_a_window_of_the_grid() -> None:
    cells = np.array([(x, y) for y in range(20) for x in range(40)])
    sizes, corners = set(), set()
    for seed in range(30):
        kept = cells[Augmentation(crop=0.5).keep(cells, np.random.default_rng(seed))]
        sizes.add(tuple(np.ptp(kept, axis=0) + 1))
        corners.add(tuple(kept.min(0)))
        assert len(kept) == 20 * 10
    assert sizes == {(20, 10)}
    assert len(corners) > 20


def test_noise_is_in_units_of_the_training_features(slide: Callable[..., Path]) -> None:
    path = slide("a", tiles=4000, features=np.zeros((4000, 6), np.float32))
    std = np.arange(6, dtype=np.float32)
    dataset = BagDataset([bag(path)], FeatureCache(), augmentation=Augmentation(noise=0.1), feature_std=std)
    np.testing.assert_allclose(dataset[0]["tile_features"].numpy().std(0), 0.1 * std, rtol=0.05)


def test_augmentation_out_of_range_is_refused() -> None:
    for wrong in ({"tile_dropout": 1.0}, {"crop": 0.0}, {"noise": -1.0}):
        with pytest.raises(LongslideError, match="augment"):
            Augmentation(**wrong)


def test_a_bag_is_cut_only_when_asked_and_then_at_random(slide: Callable[..., Path]) -> None:
    path = slide("a", tiles=50)
    original = read_features(path).features
    assert len(BagDataset([bag(path)], FeatureCache())[0]["tile_features"]) == 50
    dataset = BagDataset([bag(path)], FeatureCache(), max_tiles=20)
    drawn = [identity(dataset[[(0, epoch, 0)]]["tile_features"].numpy(), original) for epoch in range(10)]
    assert all(len(tiles) == 20 and tiles == sorted(tiles) for tiles in drawn)
    assert len(set(map(tuple, drawn))) == 10
    assert len(set(np.concatenate(drawn))) > 45, "every tile has its turn"


def test_only_seed_epoch_bag_and_draw_decide(slide: Callable[..., Path]) -> None:
    bags = [bag(slide(name, tiles=40, seed=i)) for i, name in enumerate("ab")]

    def batch(key: tuple[int, int, int], seed: int = 0, before: int = 0) -> bytes:
        dataset = BagDataset(bags, FeatureCache(), augmentation=EVERYTHING, max_tiles=20, feature_std=STD, seed=seed)
        for epoch in range(before):
            dataset[[(0, epoch, 0)]]
        return bytes(dataset[[key]]["tile_features"].numpy().tobytes())

    assert batch((0, 3, 0)) == batch((0, 3, 0), before=5)
    assert len({batch(key) for key in [(0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 1)]} | {batch((0, 3, 0), seed=1)}) == 5


def test_slide_embeddings_can_be_the_bags(slide: Callable[..., Path]) -> None:
    embeddings = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    files = [slide(n, slide_embedding=e, slide_encoder="gigapath") for n, e in zip("ab", embeddings, strict=True)]
    with_tiles = BagDataset([bag(*files)], FeatureCache())[0]
    np.testing.assert_allclose(with_tiles["slide_embedding"], embeddings.mean(0)[None], rtol=1e-6)
    batch = BagDataset([bag(*files), bag(files[0])], FeatureCache(slide_embeddings=True))[[(0, 0, 0), (1, 0, 0)]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3]
    np.testing.assert_array_equal(batch["tile_features"], embeddings[[0, 1, 0]])
    with pytest.raises(LongslideError, match=r"c\.h5: no slide embedding"):
        FeatureCache(slide_embeddings=True).read(slide("c"))


def test_the_cache_keeps_what_fits_and_no_more(slide: Callable[..., Path]) -> None:
    paths = [slide(f"s{i}", tiles=100) for i in range(5)]
    size = 100 * (6 * 2 + 16)
    cache = FeatureCache(3.5 * size / 1e9)
    for path in paths:
        cache.read(path)
    assert len(cache) == 3
    assert cache.nbytes == 3 * size
    assert cache.read(paths[0]).features.dtype == np.float16, "in the dtype of the file"
    for path in paths:
        path.unlink()
    assert len(cache.read(paths[2]).features) == 100
    with pytest.raises(LongslideError, match="no such feature file"):
        cache.read(paths[4])


def test_a_cache_without_a_limit_keeps_as_much_as_it_leaves_free(
    slide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 100 * (6 * 2 + 16)
    cache = FeatureCache(None)
    monkeypatch.setattr("longslide.data.features.cache.free_memory", lambda: 8 * size - cache.nbytes)
    for number in range(8):
        cache.read(slide(f"s{number}", tiles=100))
    assert len(cache) == 4
    monkeypatch.setattr("longslide.data.features.cache.free_memory", lambda: None)
    cache.read(slide("later", tiles=1))
    assert len(cache) == 4, "a system that does not say keeps nothing more"


@pytest.mark.parametrize("allowed", [True, False])
def test_features_for_a_gpu_move_to_page_locked_memory_once_or_stay_where_they_are(
    allowed: bool, slide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a GPU: the system gives such memory, in blocks, or refuses it."""
    blocks: list[int] = []
    empty = torch.empty

    def locked(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        if not allowed:
            raise RuntimeError("CUDA error: out of memory")
        blocks.append(size)
        return empty(size, dtype=dtype)

    paths = [slide(f"s{i}", tiles=20 + i, seed=i) for i in range(9)]
    cache = FeatureCache(1.0)
    before = [cache.read(path).features for path in paths]
    monkeypatch.setattr("longslide.data.features.cache.torch.empty", locked)
    for _ in range(2):
        for path, features in zip(paths, before, strict=True):
            tiles = cache.read(path, pinned=True)
            assert tiles.pinned == allowed
            assert tiles.features.dtype == features.dtype
            np.testing.assert_array_equal(tiles.features, features)
    assert (len(blocks) > 0) == allowed
    assert len(blocks) <= 5, "each as large as all before"
    assert all(size & (size - 1) == 0 for size in blocks)


def test_a_cache_that_is_sent_to_another_process_is_empty(slide: Callable[..., Path]) -> None:
    cache = FeatureCache(1.0, slide_embeddings=False)
    cache.read(slide("a"))
    sent = pickle.loads(pickle.dumps(cache))
    assert (len(sent), sent.limit) == (0, 0)
    assert len(sent.read(slide("a")).features) == 12


lengths = st.lists(st.integers(1, 120), min_size=1, max_size=60).map(np.array)


@given(lengths, st.integers(20, 150), st.integers(1, 5), st.integers(0, 3), st.sampled_from([None, 1, 3]))
@settings(max_examples=150, deadline=None)
def test_packing_keeps_the_budget_and_visits_every_bag_once(
    lengths: np.ndarray, budget: int, ranks: int, epoch: int, max_bags: int | None
) -> None:
    seen: list[int] = []
    counts = set()
    for rank in range(ranks):
        sampler = TokenBudgetBatchSampler(
            lengths, max_tokens=budget, max_bags=max_bags, shuffle=True, num_replicas=ranks, rank=rank
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        counts.add(len(batches))
        for batch in batches:
            assert len(batch) <= (max_bags or len(batch))
            assert sum(lengths[index] for index, _, _ in batch) <= budget or len(batch) == 1
            seen += [index for index, _, _ in batch]
    assert len(counts) == 1, "as many batches on each rank"
    assert set(seen) == set(range(len(lengths)))
    # Ranks take as many batches each: where there are not bags enough for that, a few come twice.
    assert len(seen) - len(lengths) < ranks
    if ranks == 1:
        assert len(seen) == len(lengths)


def test_the_number_of_batches_never_changes_and_they_are_full() -> None:
    lengths = np.random.default_rng(0).lognormal(8, 0.7, 400).astype(int)
    sampler = TokenBudgetBatchSampler(lengths, max_tokens=20_000, shuffle=True)
    orders = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == len(sampler)
    assert len({str(order) for order in orders}) == 20
    assert lengths.sum() / (len(sampler) * 20_000) > 0.9


def test_two_ranks_share_what_one_takes_with_twice_the_bags() -> None:
    lengths = np.arange(10, 30)
    both = [
        list(TokenBudgetBatchSampler(lengths, max_bags=1, shuffle=True, num_replicas=2, rank=rank)) for rank in (0, 1)
    ]
    one = list(TokenBudgetBatchSampler(lengths, max_bags=2, shuffle=True))
    assert one == [a + b for a, b in zip(*both, strict=True)]


def test_balanced_sampling_draws_each_class_as_often() -> None:
    stratum = np.array([0] * 90 + [1] * 10)
    lengths = np.random.default_rng(0).integers(5, 50, 100)
    sampler = TokenBudgetBatchSampler(lengths, max_tokens=200, shuffle=True, stratum=stratum)
    counts = np.zeros(100, int)
    for epoch in range(9):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        keys = [key for batch in batches for key in batch]
        assert len(set(keys)) == len(keys) == 100, "a bag that comes again is another draw"
        assert sum(stratum[index] for index, _, _ in keys) == 50
        np.add.at(counts, [index for index, _, _ in keys], 1)
    assert counts[90:].tolist() == [45] * 10
    assert counts[:90].min() > 0


@given(lengths, st.integers(20, 150), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_evaluation_is_in_order_and_no_rank_is_without_a_batch(lengths: np.ndarray, budget: int, ranks: int) -> None:
    samplers = [
        TokenBudgetBatchSampler(lengths, max_tokens=budget, num_replicas=ranks, rank=rank) for rank in range(ranks)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(own) for own in batches]
    assert all(batches)
    together = [own[turn] for turn in range(len(batches[0])) for own in batches if turn < len(own)]
    indices = [index for batch in together for index, _, _ in batch]
    assert list(dict.fromkeys(indices)) == list(range(len(lengths)))
    if len(lengths) >= ranks:
        assert indices == list(range(len(lengths)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_within_an_epoch_where_it_was(workers: int, slide: Callable[..., Path]) -> None:
    bags = [bag(slide(f"s{i}", tiles=10 + i, seed=i)) for i in range(12)]

    def loader() -> BagLoader:
        dataset = BagDataset(bags, FeatureCache(), augmentation=EVERYTHING, feature_std=STD)
        sampler = TokenBudgetBatchSampler(dataset.lengths, max_tokens=40, shuffle=True)
        return BagLoader(dataset, sampler=sampler, threads=workers)

    whole = loader()
    whole.sampler.set_epoch(3)
    batches = list(whole)
    assert len(batches) == len(whole)

    stopped = loader()
    stopped.sampler.set_epoch(3)
    iterator = iter(stopped)
    for _ in range(2):
        next(iterator)
    state = stopped.state_dict()
    assert state == {"epoch": 3, "batches": 2}

    resumed = loader()
    resumed.load_state_dict(state)
    resumed_iterator = iter(resumed)
    resumed.sampler.set_epoch(3)  # Lightning tells the epoch after it has asked for the iterator
    rest = list(resumed_iterator)
    assert len(rest) == len(batches) - 2
    for one, other in zip(rest, batches[2:], strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name
    assert resumed.state_dict() == whole.state_dict(), "as if it had never stopped"
    resumed.sampler.set_epoch(4)
    assert len(list(resumed)) == len(batches), "the next epoch is whole"


def test_collate_leaves_out_what_not_all_have() -> None:
    sample = {"tile_features": np.ones((2, 3), np.float32), "grid_cells": np.zeros((2, 2), np.int64), "index": 0}
    batch = collate([sample | {"slide_embedding": np.ones(4, np.float32)}, sample])
    assert set(batch) == {"tile_features", "grid_cells", "cu_seqlens", "index"}
