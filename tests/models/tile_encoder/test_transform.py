import numpy as np
import pytest
import torch
from longslide.models.tile_encoder.spec import list_tile_encoders, load_tile_encoder_spec
from longslide.models.tile_encoder.transform import TileTransform
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

RECIPES = sorted(
    {
        (spec.resize, spec.interpolation, spec.crop, spec.mean, spec.std)
        for spec in map(load_tile_encoder_spec, list_tile_encoders())
    }
)


def tiles(height, width, seed=0):
    """Noise and hard edges: the images on which resampling implementations differ most."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    edges = np.repeat((((rows // 9 + columns // 5) % 2) * 255)[..., None], 3, axis=2).astype(np.uint8)
    return np.stack([noise, edges])


def published(recipe, batch):
    resize, interpolation, crop, mean, std = recipe
    steps = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return torch.stack([steps(Image.fromarray(tile)) for tile in batch])


@pytest.mark.parametrize("size", [224, 256, 512, 225, 299, 97, 1000])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}-{r[3][0]}")
def test_the_transform_equals_torchvision_on_pil_images_bit_for_bit(recipe, size):
    batch = tiles(size, size)
    assert torch.equal(TileTransform(*recipe)(torch.from_numpy(batch)), published(recipe, batch))


@pytest.mark.parametrize(("height", "width"), [(300, 217), (224, 301), (255, 256), (1, 5)])
@pytest.mark.parametrize("resize", [224, 248, 225])
def test_tiles_that_are_not_square_and_odd_crops_follow_torchvision_too(height, width, resize):
    recipe = (resize, "bicubic", 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    batch = tiles(height, width)
    assert torch.equal(TileTransform(*recipe)(torch.from_numpy(batch)), published(recipe, batch))


@pytest.mark.parametrize("size", [256, 299, 512])
def test_encoders_published_with_a_tensor_resize_differ_by_one_grey_level_at_most(size):
    recipe = (224, "bilinear", 224, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    batch = tiles(size, size)
    resized = v2.Compose([v2.Resize(224), v2.CenterCrop(224)])(torch.from_numpy(batch).permute(0, 3, 1, 2))
    ours = TileTransform(*recipe)(torch.from_numpy(batch)) * 255
    assert (ours.round() - resized.float()).abs().max() <= 1


def test_a_tile_of_the_resize_size_is_not_resampled():
    batch = tiles(256, 256)
    ours = TileTransform(256, "bicubic", 224, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(torch.from_numpy(batch))
    assert torch.equal(
        (ours * 255).round().to(torch.uint8).permute(0, 2, 3, 1), torch.from_numpy(batch[:, 16:240, 16:240])
    )


def test_autocast_does_not_touch_the_transform():
    batch = torch.from_numpy(tiles(256, 256))
    transform = TileTransform(*RECIPES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform(batch), published(RECIPES[0], batch.numpy()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [224, 256, 299])
def test_the_gpu_gives_the_same_as_the_cpu(interpolation, size):
    batch = torch.from_numpy(tiles(size, size))
    transform = TileTransform(224, interpolation, 224, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert torch.equal(transform(batch.cuda()).cpu(), transform(batch))


def test_tiles_of_another_type_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        TileTransform(*RECIPES[0])(torch.zeros(1, 224, 224, 3))
