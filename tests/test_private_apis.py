"""What Longslide leans on that its libraries do not promise: each by name, so that an upgrade says what it broke."""

from pathlib import Path

import timm
import torch
from longslide.models.tile_encoder.spec import timm_architectures


def test_openslide_lowlevel_reads_a_region_into_a_buffer(tmp_path: Path) -> None:
    import openslide
    from longslide import write_synthetic_slide
    from openslide import lowlevel

    write_synthetic_slide(tmp_path / "a.tif", size=(512, 512), mpp=0.5)
    slide = openslide.OpenSlide(tmp_path / "a.tif")
    buffer = (16 * 16 * lowlevel.c_uint32)()
    lowlevel._read_region(slide._osr, buffer, 0, 0, 0, 16, 16)
    b, g, r, a = bytes(memoryview(buffer))[:4]
    assert (r, g, b, a) == slide.read_region((0, 0), 0, (16, 16)).getpixel((0, 0))


def test_the_cpu_attention_of_aten_gives_the_log_sum_exp() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    scores = q @ k.transpose(-1, -2) / 2
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    torch.testing.assert_close(logsumexp.reshape(1, 2, 8), scores.logsumexp(-1))


def test_the_gpu_attention_of_aten_is_there() -> None:
    for name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"):
        assert hasattr(torch.ops.aten, name), name


def test_dynamo_takes_memory_by_shape_strides_and_dtype() -> None:
    guards = torch._C._dynamo.guards
    assert hasattr(guards, "_empty_strided_cuda")
    found = guards._empty_strided_cpu((2, 3), (3, 1), torch.bfloat16)
    assert (found.shape, found.stride(), found.dtype) == ((2, 3), (3, 1), torch.bfloat16)


def test_a_fused_adamw_marks_itself_for_scaled_gradients() -> None:
    assert torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=True)._step_supports_amp_scaling


def test_jsonargparse_has_the_actions_that_recipes_and_plugins_extend() -> None:
    from jsonargparse import ActionConfigFile, ArgumentParser
    from jsonargparse._typehints import ActionTypeHint

    assert callable(ActionConfigFile.__call__)
    assert callable(ActionTypeHint._check_type)
    assert isinstance(ArgumentParser()._option_string_actions, dict)


def test_the_files_of_timm_name_its_architectures() -> None:
    assert set(timm.list_models()) <= set(timm_architectures())
