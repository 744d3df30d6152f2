import threading
from dataclasses import asdict, replace

import pytest
import timm
import torch
import yaml
from longslide.errors import LongslideError
from longslide.models.tile_encoder.encoder import create_tile_encoder
from longslide.models.tile_encoder.spec import load_tile_encoder_spec
from timm.data import create_transform, resolve_data_config
from torchvision.transforms.functional import to_pil_image


def tiles(count=2, size=256):
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def write_spec(path, **changes):
    """A YAML file with the facts of a small timm model, and changes."""
    spec = replace(load_tile_encoder_spec("vit_tiny_patch16_224"), name="mine", **changes)
    path.write_text(yaml.safe_dump(asdict(spec)))
    return path


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_a_timm_model_gives_what_timm_gives_with_its_own_transform(name):
    encoder = create_tile_encoder(name, checkpoint="random")
    network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    network.load_state_dict(encoder.network.state_dict())
    transform = create_transform(**resolve_data_config(pretrained_cfg=network.pretrained_cfg))
    images = torch.stack([transform(to_pil_image(tile.permute(2, 0, 1))) for tile in tiles()])
    with torch.inference_mode():
        assert torch.equal(encoder(tiles()), network(images))
    assert not encoder.training


@pytest.mark.parametrize("size", [224, 256, 301])
def test_tiles_of_any_size_give_embeddings_of_the_dimension_of_the_spec(size):
    encoder = create_tile_encoder("vit_tiny_patch16_224", checkpoint="random")
    with torch.inference_mode():
        embeddings = encoder(tiles(3, size))
    assert embeddings.shape == (3, encoder.dim)
    assert embeddings.dtype == torch.float32


def test_pooling_takes_the_class_token_and_leaves_registers_out_of_the_mean(tmp_path):
    changes = {"architecture": "vit_small_patch14_reg4_dinov2", "crop": 56, "resize": 56, "dim": 384}
    small = {"img_size": 56, "depth": 1}
    made = {}
    for pooling, dim in (("cls", 384), ("mean", 384), ("cls+mean", 768)):
        path = write_spec(tmp_path / "mine.yaml", timm_args=small, pooling=pooling, **(changes | {"dim": dim}))
        encoder = create_tile_encoder(path, checkpoint="random")
        with torch.inference_mode():
            made[pooling] = encoder(tiles())
            tokens = encoder.network.forward_features(encoder.transform(tiles()))
    assert tokens.shape[1] == 1 + 4 + 16
    assert torch.equal(made["cls"], tokens[:, 0])
    torch.testing.assert_close(made["mean"], tokens[:, 5:].mean(dim=1))
    assert torch.equal(made["cls+mean"], torch.cat([made["cls"], made["mean"]], dim=1))


def test_random_weights_follow_the_seed_and_are_recorded():
    first, again, other = (
        create_tile_encoder("vit_tiny_patch16_224", checkpoint="random", seed=seed) for seed in (0, 0, 1)
    )
    assert (first.weights, other.weights) == ("random seed=0", "random seed=1")
    weights = [encoder.network.patch_embed.proj.weight for encoder in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_building_an_encoder_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    encoder = create_tile_encoder("vit_tiny_patch16_224", checkpoint="random")
    torch.save(encoder.network.state_dict(), tmp_path / "weights.pth")
    create_tile_encoder("vit_tiny_patch16_224", checkpoint=tmp_path / "weights.pth")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_half_precision_network_gets_an_exact_transform():
    encoder = create_tile_encoder("vit_tiny_patch16_224", checkpoint="random")
    with torch.inference_mode():
        exact = encoder(tiles())
        half = encoder.bfloat16()(tiles())
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float(), exact).min() > 0.999


def test_an_encoder_embeds_in_several_threads():
    encoder = create_tile_encoder("vit_tiny_patch16_224", checkpoint="random")
    with torch.inference_mode():
        alone = encoder(tiles())
    results = []

    def embed():
        with torch.inference_mode():
            results.append(encoder(tiles()))

    threads = [threading.Thread(target=embed) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, alone) for result in results)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "vit_tiny_patch16_2240"}, "timm cannot build vit_tiny_patch16_2240"),
        ({"timm_args": {"colour": "red"}}, "timm cannot build .*colour"),
        ({"timm_args": {"img_size": 384}}, "`crop` is 224, but vit_tiny_patch16_224 takes 384"),
        ({"architecture": "resnet18", "pooling": "cls"}, "pooling 'cls' needs a ViT"),
    ],
)
def test_a_spec_that_timm_cannot_build_is_refused(tmp_path, changes, complaint):
    with pytest.raises(LongslideError, match=complaint):
        create_tile_encoder(write_spec(tmp_path / "mine.yaml", **changes), checkpoint="random")


def test_a_wrong_dimension_is_found_on_the_first_batch(tmp_path):
    encoder = create_tile_encoder(write_spec(tmp_path / "mine.yaml", dim=384), checkpoint="random")
    with pytest.raises(LongslideError, match=r"shape \(192,\), but its `dim` is 384"):
        encoder(tiles(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_embeddings_of_the_cpu():
    encoder = create_tile_encoder("vit_tiny_patch16_224", checkpoint="random")
    with torch.inference_mode():
        expected = encoder(tiles())
        found = encoder.cuda()(tiles().cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
