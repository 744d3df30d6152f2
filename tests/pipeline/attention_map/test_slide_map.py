"""The map of a slide shows the tiles that attention lets a tile see, at their places."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from longslide import LongslideError, dilated_attention
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features
from longslide.models.slide_encoder.spec import load_slide_encoder_spec
from longslide.pipeline.attention_map.attention_map import attention_map
from longslide.pipeline.attention_map.sight import Sight, keys_seen, layers_to_reach, sight_of_spec
from longslide.pipeline.attention_map.slide_map import draw_slide_map

BRANCHES = ((8, 1), (16, 2), (100, 4))


def write_slide(path: Path) -> Path:
    """A disc of tiles of 512 level-0 pixels."""
    rows, columns = np.nonzero(np.hypot(*(np.mgrid[:12, :15] - np.array([[[6]], [[7]]]))) < 6)
    coords = np.stack([columns, rows], 1) * 512
    write_features(
        path,
        Features(path.stem, np.zeros((len(coords), 4), np.float16), coords, 512, 512, 256, 0, 0.5, 0.25, (7680, 6144)),
    )
    return path


def dilated(heads: int, branches: tuple[tuple[int, int], ...], tiles: int) -> Sight:
    return sight_of_spec(load_slide_encoder_spec("gigapath"), heads, branches, tiles)


def test_the_keys_seen_are_those_through_which_gradients_flow() -> None:
    tokens, heads = 45, 4
    q, k = (torch.randn(1, tokens, heads, 2, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, tokens, heads, 2, dtype=torch.float64, requires_grad=True)
    output = dilated_attention(q, k, v, *zip(*BRANCHES, strict=True), backend="naive")
    for query in range(tokens):
        (flows,) = torch.autograd.grad(output[0, query].sum(), v, retain_graph=True)
        seen = keys_seen(np.arange(tokens) == query, heads, BRANCHES).any(0)
        assert (seen == (flows[0] != 0).any(-1).T.numpy()).all()


def test_a_layer_reaches_what_is_seen_by_what_the_one_before_has_reached() -> None:
    tokens, heads, layers = 45, 2, 3
    sees = np.stack([keys_seen(np.arange(tokens) == query, heads, BRANCHES).any((0, 1)) for query in range(tokens)])
    sees |= np.eye(tokens, dtype=bool)
    for query in (0, 17, 44):
        reached = layers_to_reach(query, tokens, layers, lambda _, known: keys_seen(known, heads, BRANCHES))
        known = np.arange(tokens) == query
        for layer in range(layers + 1):
            assert ((reached <= layer) == known).all()
            known = sees[known].any(0)
    alone = layers_to_reach(3, 16, 5, lambda _, known: keys_seen(known, 1, ((4, 1),)))
    assert alone.tolist() == [1, 1, 1, 0] + [6] * 12, "other segments are never reached by one branch"


def test_a_tile_is_drawn_at_its_place_with_what_it_sees(tmp_path: Path) -> None:
    cells = np.stack(np.meshgrid(np.arange(10), np.arange(6)), -1).reshape(-1, 2)
    figure = draw_slide_map(cells, 34, dilated(1, ((10, 1),), 60), "a slide")
    (all_heads,) = (a for f in figure.subfigs for a in f.axes if a.get_title().startswith("all heads"))
    picture = np.asarray(all_heads.images[0].get_array())
    tokens = np.arange(60) + 1
    seen = (tokens // 10 == 35 // 10).reshape(6, 10)  # the class token is the first of the first segment
    assert (np.ptp(picture, axis=-1) > 0.1).tolist() == seen.tolist()
    rings = {tuple(map(tuple, line.get_xydata().tolist())) for line in all_heads.lines}
    assert rings == {((4.0, 3.0),)}, "a dark ring in a light one, at the tile"


def test_the_command_draws_a_feature_file_as_a_picture_or_with_text_as_text(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.h5")
    result = attention_map(tmp_path / "map.svg", slide=slide, tile="3600,3100")
    assert result.seen == 1, "a slide this small is within GigaPath's first segment"
    text = "".join(ElementTree.parse(tmp_path / "map.svg").getroot().itertext())
    assert "a: which tiles the tile at 3,584, 3,072 sees (gigapath, 16 heads)" in text
    sparse = attention_map(
        tmp_path / "map.png", slide=slide, tile="[3600,3100]", heads=2, segment_lengths=[8, 200], dilated_ratios=[1, 4]
    )
    assert 0.05 < sparse.seen < 0.5
    assert attention_map(tmp_path / "map.pdf", slide=slide).output.read_bytes().startswith(b"%PDF")


def test_a_long_strip_of_tissue_is_a_picture_of_some_size(tmp_path: Path) -> None:
    cells = np.stack([np.zeros(2000, int), np.arange(2000)], 1)
    width, height = draw_slide_map(cells, 7, dilated(1, ((10, 1),), 2000), "a strip").get_size_inches()
    assert height < 10 * width


def test_a_feature_file_without_tiles_is_refused_by_name(tmp_path: Path) -> None:
    nothing = np.zeros((0, 2), int)
    features = Features("a", np.zeros((0, 4), np.float16), nothing, 512, 512, 256, 0, 0.5, 0.25, (7680, 6144))
    write_features(tmp_path / "a.h5", features)
    with pytest.raises(LongslideError, match=r"a\.h5: has no tiles"):
        attention_map(tmp_path / "map.png", slide=tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": "9,9"}, "no tile holds the pixel 9, 9; the nearest begins at"),
        ({"tile": "nine"}, "--tile nine: give x and y in level-0 pixels"),
        ({"tile": "1,2,3"}, "give x and y"),
        ({"causal": True}, "--slide draws the attention of a slide encoder or a checkpoint, which sees both ways"),
        ({"pattern": "dense"}, "leave --pattern, its settings and --causal out"),
        ({"random_keys": 5}, "leave --pattern, its settings and --causal out"),
        ({"checkpoint": "no.ckpt"}, r"no\.ckpt: .*no such"),
        ({"checkpoint": "a.ckpt", "heads": 4}, "--checkpoint says which slide encoder"),
        ({"slide": None, "checkpoint": "a.ckpt"}, "--checkpoint is a model that looks at a slide"),
        ({"slide_encoder": "gigapaht"}, "did you mean gigapath"),
        ({"segment_lengths": [8]}, "one of each a branch"),
        ({"tokens": 100}, "--slide has tokens of its own"),
        ({"window": 5}, "leave --pattern, its settings and --causal out"),
        ({"output": "map.gif"}, "a picture is written as .png, .svg, .pdf"),
        ({"slide": None, "tile": "1,2"}, "--tile is a tile of a slide"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, options: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"slide": write_slide(tmp_path / "a.h5"), "output": tmp_path / "map.png"}
    with pytest.raises(LongslideError, match=message) as error:
        attention_map(**given | options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "map.png").exists()
