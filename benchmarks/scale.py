"""Tiles per second of `longslide embed` on one GPU and on several, the same slides one run after the other.

    python benchmarks/scale.py [--tile-encoder gigapath] [--devices 0 0,1] [--slides 80] [--edge 20480]

Drawn slides of `edge` pixels squared, tissue found, random weights from a file, the encoder's own precision. `steady` is
the rate from when every GPU has finished two slides to the end of the last one: what is left out is loading the weights and
compiling, which a short job and a long one pay once. `wall` is the whole job.

Measured on two H100 of one host (torch 2.11): 1,087 tiles/s on one, 2,152 on both (1.98 times; the whole job 130.6 and 75.0
seconds). With half of the slides 1.80: the last slide of one GPU, which the other has no part in, is then 5% of the time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from longslide import embed, write_synthetic_slide
from longslide.models.tile_encoder.encoder import build_network
from longslide.models.tile_encoder.spec import load_tile_encoder_spec
from safetensors.torch import save_file

DRAWN = 2
"""Different slides; the others are links to them."""


def write_slides(folder: Path, slides: int, edge: int) -> None:
    """As many slides as asked for, of a few pictures."""
    folder.mkdir()
    for i in range(slides):
        path = folder / f"{i:03d}.svs"
        if i < DRAWN:
            write_synthetic_slide(path, size=(edge, edge), seed=i)
        else:
            path.hardlink_to(folder / f"{i % DRAWN:03d}.svs")


def write_weights(path: Path, tile_encoder: str) -> None:
    """Random weights of an encoder, LayerScale at 0.1 to 1."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = build_network(load_tile_encoder_spec(tile_encoder))
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                torch.nn.init.uniform_(parameter, 0.1, 1)
    save_file({name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}, path)


def rates(slides: Path, output: Path, weights: Path, tile_encoder: str, devices: str) -> tuple[int, float, float]:
    """Tiles, and steady tiles per second and seconds of the whole job."""
    count = len(devices.split(","))
    started = time.time()
    results = embed([slides], output, tile_encoder=tile_encoder, tile_checkpoint=weights, devices=devices)
    wall = time.time() - started
    unfinished = [result for result in results if result.status != "done"]
    assert not unfinished, unfinished[0]
    ended = sorted((Path(result.features or "").stat().st_mtime, result.tiles or 0) for result in results)
    first, timed = ended[2 * count - 1], ended[2 * count :]
    tiles = sum(result.tiles or 0 for result in results)
    return tiles, sum(tiles for _, tiles in timed) / (timed[-1][0] - first[0]), wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile-encoder", default="gigapath")
    parser.add_argument("--devices", nargs="+", default=["0", "0,1"], help="as `embed --devices` takes them")
    parser.add_argument("--slides", type=int, default=80)
    parser.add_argument("--edge", type=int, default=20_480)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slides(folder / "slides", options.slides, options.edge)
        write_weights(folder / "weights.safetensors", options.tile_encoder)
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{options.tile_encoder}, {options.slides} slides, {machine}, torch {torch.__version__}")
        print(f"{'devices':>12} {'tiles':>8} {'steady tiles/s':>15} {'ratio':>6} {'wall s':>8}")
        one = None
        for devices in options.devices:
            tiles, steady, wall = rates(
                folder / "slides",
                folder / devices.replace(":", ""),
                folder / "weights.safetensors",
                options.tile_encoder,
                devices,
            )
            one = one or steady
            print(f"{devices:>12} {tiles:8,} {steady:15,.0f} {steady / one:6.2f} {wall:8.1f}", flush=True)


if __name__ == "__main__":
    main()
