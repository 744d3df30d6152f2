"""The attention map shows what the attention function does, and counts its work."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import longslide
from longslide import LongslideError, dilated_attention
from longslide.pipeline.attention_map.attention_map import attention_map, scored_pairs, visible_keys
from longslide.pipeline.attention_map.figure import COLOURS
from PIL import Image


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return longslide("attention-map", *words)


@pytest.mark.parametrize("causal", [False, True])
def test_the_keys_drawn_are_those_through_which_gradients_flow(causal: bool) -> None:
    tokens, heads, branches = 21, 3, ((4, 1), (9, 2), (100, 5))
    q, k, v = (torch.randn(1, tokens, heads, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lengths, ratios = zip(*branches, strict=True)
    output = dilated_attention(q, k, v, lengths, ratios, causal, backend="naive")
    seen = visible_keys(tokens, heads, "dilated", causal, branches=branches).any(0)
    for query in range(tokens):
        for head in range(heads):
            (flows,) = torch.autograd.grad(output[0, query, head].sum(), v, retain_graph=True)
            assert ((flows[0, :, head] != 0).any(1).numpy() == seen[head, query]).all()
            assert (np.delete(flows[0].numpy(), head, axis=1) == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 13, 40])
@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("dilated", {"branches": ((4, 1), (9, 2), (100, 5))}),
        ("dense", {}),
        ("sliding-window", {"window": 3}),
        ("sliding-window", {"window": 50}),
        ("strided", {"period": 6}),
        ("learned", {"block_size": 1, "chosen_blocks": 3}),
        ("learned", {"block_size": 13, "chosen_blocks": 1}),
    ],
)
def test_the_work_counted_is_the_pairs_seen(
    pattern: str, settings: dict[str, object], tokens: int, causal: bool
) -> None:
    seen = visible_keys(tokens, 3, pattern, causal, **settings)  # type: ignore[arg-type]
    counted = scored_pairs(tokens, 3, pattern, causal, **settings)  # type: ignore[arg-type]
    means = 0
    if pattern == "learned":  # chooses by pairs of blocks, which are work too
        blocks = -(-tokens // settings["block_size"])
        means = 3 * (blocks * (blocks - 1) // 2 if causal else blocks**2)
        if tokens % settings["block_size"]:
            return  # keys that the last block has not are counted
    assert counted == (seen.sum((1, 2, 3)) + means).tolist()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 13, 40])
def test_random_keys_that_are_neighbours_are_counted_as_work_and_no_others(tokens: int, causal: bool) -> None:
    settings = {"window": 2, "global_tokens": 1, "random_keys": 4}
    seen = visible_keys(tokens, 3, "random", causal, **settings)
    near = visible_keys(tokens, 3, "random", causal, **settings | {"random_keys": 1, "pattern_seed": 1})
    near &= visible_keys(tokens, 3, "random", causal, **settings | {"random_keys": 1, "pattern_seed": 2})
    [counted] = scored_pairs(tokens, 3, "random", causal, **settings)
    drawn = np.minimum(4, np.arange(1, tokens) + 1 if causal else tokens)  # the first token is global, and sees all
    assert int(seen.sum()) <= counted <= int(near.sum()) + 3 * int(np.broadcast_to(drawn, tokens - 1).sum())


def test_the_command_draws_every_branch_and_states_the_share(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "new" / "map.png", "--tokens", "32", "--segment-lengths", "[8,16,32]")
    assert done.returncode == 0, done.stderr
    # 4 * 8 * 8, 2 * 8 * 8 and 8 * 8 of 32 * 32 pairs
    assert "43.8% of dense attention" in done.stdout
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["map.png"]
    with Image.open(tmp_path / "new" / "map.png") as picture:
        colours = {colour: count for count, colour in picture.convert("RGB").getcolors(2**24)}
    for colour in COLOURS[:3]:
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert colours.get(rgb, 0) > 5000, "the branch covers an area of the picture"


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "dense", "tokens": 5, "heads": 1},
        {"pattern": "sliding-window", "window": 2, "causal": True},
        {"pattern": "strided", "period": 3},
        {"pattern": "random", "random_keys": 4},
        {"pattern": "random", "random_keys": 4, "window": 3, "global_tokens": 2, "causal": True},
        {"pattern": "learned", "block_size": 8, "chosen_blocks": 2},
        {"pattern": "learned", "block_size": 8, "chosen_blocks": 2, "tokens": 7},
        {"tokens": 1, "heads": 1},
        {"tokens": 70, "heads": 10, "segment_lengths": [10, 1000], "dilated_ratios": [1, 10], "causal": True},
    ],
)
def test_every_pattern_can_be_drawn(settings: dict[str, object], tmp_path: Path) -> None:
    drawn = attention_map(tmp_path / "map.png", **settings)  # type: ignore[arg-type]
    assert drawn.share > 0
    assert 0 < drawn.seen <= 1
    assert drawn.output.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_lengths": [8, 16]}, "one of each a branch"),
        ({"dilated_ratios": [1, 2, 0]}, "--dilated-ratios 0 must be at least 1"),
        ({"segment_lengths": [4] * 9, "dilated_ratios": [1] * 9}, "9 branches"),
        ({"tokens": 0}, "--tokens 0"),
        ({"tokens": 70_000_000}, "a picture takes 1 to 1,048,576 tokens"),
        ({"heads": 0}, "--heads 0"),
        ({"pattern": "strided"}, "needs a period"),
        ({"pattern": "sparse"}, "'sparse' is none of"),
        ({"window": 4}, "window 4 is for attention pattern 'sliding-window' or 'random'"),
        ({"pattern": "random"}, "needs random keys of at least 1"),
        ({"pattern": "learned", "block_size": 8}, "needs chosen blocks of at least 1"),
        ({"block_size": -8}, "--block-size -8 must be at least 0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LongslideError, match=message):
        attention_map(tmp_path / "map.png", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_more_blocks_than_there_are_see_all_and_the_work_of_choosing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"tokens": 64, "pattern": "learned", "block_size": 16}
    all_three = attention_map(tmp_path / "three.svg", chosen_blocks=3, **options)  # type: ignore[arg-type]
    more = attention_map(tmp_path / "more.svg", chosen_blocks=99, **options)  # type: ignore[arg-type]
    assert (more.share, more.seen) == (all_three.share, 1) == (1 + 16 / 64**2, 1)
    assert "the pairs of blocks, by which it chooses, count too" in capsys.readouterr().out
    assert "its block of 16, 3 of 3 others chosen" in (tmp_path / "more.svg").read_text()


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--output", tmp_path / "file" / "map.png", "--tokens", "8")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "choose another --output" in done.stderr
