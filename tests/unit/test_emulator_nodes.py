"""Nodes of the emulator that compute with pictures, masks and plain values."""

from __future__ import annotations

import inspect
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_emulator.node_api import InterruptProcessingException
from comfy_emulator.nodes import REGISTRY
from comfy_emulator.nodes.pixels import scale
from comfy_emulator.tensor_text import describe, tensor_text
from tests.support.comfyui.node_context import RecordingContext, floats, levels, pictures

METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
OBJECT_INFO: dict[str, Any] = json.loads(
    resources.files("comfy_emulator").joinpath("data/object_info.json").read_text(encoding="utf-8")
)


@pytest.fixture
def bench(tmp_path: Path) -> RecordingContext:
    return RecordingContext(tmp_path)


def test_every_class_has_an_interface_and_every_interface_a_class() -> None:
    assert set(REGISTRY.nodes) == set(OBJECT_INFO)


@pytest.mark.parametrize("class_type", sorted(OBJECT_INFO))
def test_a_node_takes_the_inputs_of_its_interface(class_type: str) -> None:
    node, inputs = REGISTRY.nodes[class_type], OBJECT_INFO[class_type]["input"]
    signature = inspect.signature(node.function)
    required, optional = dict(inputs.get("required", {})), dict(inputs.get("optional", {}))
    signature.bind("context", **required)
    signature.bind("context", **required, **optional)
    assert {*node.validates} <= {*required}


@pytest.mark.parametrize("class_type", sorted(OBJECT_INFO))
def test_lists_of_files_and_models_are_left_to_the_server(class_type: str) -> None:
    inputs = OBJECT_INFO[class_type]["input"]
    shown = [inputs.get("required", {}), inputs.get("optional", {})]
    for entry in (entry for group in shown for entry in group.values()):
        options = entry[1] if len(entry) > 1 else {}
        values = entry[0] if isinstance(entry[0], list) else options.get("options", [])
        assert not [value for value in values if str(value).endswith((".png", ".mp4", ".wav", ".safetensors"))]


def test_empty_image_has_the_colour(bench: RecordingContext) -> None:
    image = bench.one("EmptyImage", width=3, height=2, batch_size=4, color=0x204060)
    assert image.shape == (4, 2, 3, 3)
    assert image.dtype == np.float32
    assert (image * 255 == floats(0x20, 0x40, 0x60)).all()


# Expected values: worked out by hand from the formulas of torch's interpolate (align_corners off, no antialias).
@pytest.mark.parametrize(
    ("method", "row", "expected"),
    [
        ("nearest-exact", [0, 1, 2, 3], [1, 3]),
        ("nearest-exact", [0, 1], [0, 0, 1, 1]),
        ("bilinear", [0, 1], [0, 0.25, 0.75, 1]),
        ("bilinear", [0, 1, 2, 3], [0.5, 2.5]),
        ("area", [0, 1, 2, 3], [0.5, 2.5]),
        ("area", [0, 3, 6], [1.5, 4.5]),
        ("bicubic", [0, 1], [-0.10546875, 0.2265625, 0.7734375, 1.10546875]),
    ],
)
def test_scale_follows_the_formulas_of_torch(method: str, row: list[float], expected: list[float]) -> None:
    across = np.array(row, dtype=np.float32).reshape(1, 1, -1, 1)
    assert scale(across, len(expected), 1, method).ravel() == pytest.approx(expected)
    assert scale(across.transpose(0, 2, 1, 3), 1, len(expected), method).ravel() == pytest.approx(expected)


sides = st.integers(1, 24)


@settings(deadline=None, max_examples=60)
@given(sides, sides, sides, sides, st.sampled_from(METHODS), st.sampled_from(["disabled", "center"]))
def test_scale_gives_the_size_and_keeps_one_colour(
    height: int, width: int, new_height: int, new_width: int, method: str, crop: str
) -> None:
    grey = np.full((2, height, width, 3), 100 / 255, dtype=np.float32)
    try:
        result = scale(grey, new_width, new_height, method, crop)
    except RuntimeError as error:  # as in ComfyUI: three or more pixels to the middle of which none belongs
        assert crop == "center"
        assert "size" in str(error)
        return
    assert result.shape == (2, new_height, new_width, 3)
    assert result.dtype == np.float32
    assert result == pytest.approx(grey[0, 0, 0, 0], abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(sides, sides, st.sampled_from([*METHODS, "bislerp"]))
def test_scale_to_the_same_size_changes_nothing(height: int, width: int, method: str) -> None:
    images = pictures(1, height, width)
    assert scale(images, width, height, method) == pytest.approx(images, abs=1e-5)


def test_scale_to_no_size_fails_in_words_of_torch() -> None:
    with pytest.raises(RuntimeError, match=r"got input \(H: 2, W: 3\) output \(H: 1, W: 0\)"):
        scale(pictures(1, 2, 3), 0, 1, "bilinear")


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 64), st.integers(0, 64))
def test_image_scale_derives_a_side_of_zero(height: int, width: int, new_width: int, new_height: int) -> None:
    function = REGISTRY.nodes["ImageScale"].function
    image = pictures(1, height, width)
    result = function(None, image, "nearest-exact", new_width, new_height, "disabled").outputs[0]
    if new_width == new_height == 0:
        assert result is image
    else:
        expected_width = new_width or max(1, round(width * new_height / height))
        expected_height = new_height or max(1, round(height * new_width / width))
        assert result.shape[1:3] == (expected_height, expected_width)


def test_image_scale_crops_to_the_middle(bench: RecordingContext) -> None:
    image = pictures(1, 4, 8)
    cut = bench.one("ImageScale", image=image, upscale_method="nearest-exact", width=4, height=4, crop="center")
    assert (cut == image[:, :, 2:6]).all()


def test_image_scale_by_and_to_megapixels(bench: RecordingContext) -> None:
    image = pictures(1, 10, 15)
    assert bench.one("ImageScaleBy", image=image, upscale_method="area", scale_by=0.5).shape == (1, 5, 8, 3)
    total = bench.one(
        "ImageScaleToTotalPixels", image=image, upscale_method="area", megapixels=0.01, resolution_steps=8
    )
    assert total.shape == (1, 80, 128, 3)


def test_image_invert_twice_is_the_image(bench: RecordingContext) -> None:
    image = pictures(2, 3, 4)
    inverted = bench.one("ImageInvert", image=image)
    assert (levels(inverted) + levels(image).astype(int) >= 254).all()
    assert bench.one("ImageInvert", image=inverted) == pytest.approx(image)


def test_image_batch_scales_the_second_to_the_first(bench: RecordingContext) -> None:
    first, second = pictures(2, 4, 4), pictures(1, 8, 6, channels=4)
    both = bench.one("ImageBatch", image1=first, image2=second)
    assert both.shape == (3, 4, 4, 4)
    assert (both[:2, ..., :3] == first).all()
    assert (both[:2, ..., 3] == 1).all()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("normal", 0.75),
        ("multiply", 0.375),
        ("screen", 0.875),
        ("overlay", 0.75),
        ("soft_light", 0.5 + 0.5 * (0.5**0.5 - 0.5)),
        ("difference", 0.0),
    ],
)
def test_image_blend(bench: RecordingContext, mode: str, expected: float) -> None:
    below, above = np.full((1, 2, 2, 3), 0.5, np.float32), np.full((1, 4, 4, 4), 0.75, np.float32)
    full = bench.one("ImageBlend", image1=below, image2=above, blend_factor=1.0, blend_mode=mode)
    none = bench.one("ImageBlend", image1=below, image2=above, blend_factor=0.0, blend_mode=mode)
    assert full == pytest.approx(np.full((1, 2, 2, 3), expected), abs=1e-6)
    assert (none == below).all()


@settings(deadline=None, max_examples=60)
@given(*(st.integers(1, 12) for _ in range(4)), st.integers(0, 20), st.integers(0, 20))
def test_image_crop_stays_inside_and_leaves_a_pixel(
    height: int, width: int, crop_height: int, crop_width: int, x: int, y: int
) -> None:
    image = pictures(1, height, width)
    cropped = REGISTRY.nodes["ImageCrop"].function(None, image, crop_width, crop_height, x, y).outputs[0]
    left, top = min(x, width - 1), min(y, height - 1)
    assert cropped.shape[1:3] == (min(crop_height, height - top), min(crop_width, width - left))
    assert (cropped[0, 0, 0] == image[0, top, left]).all()


def test_image_flip_and_rotate(bench: RecordingContext) -> None:
    image = pictures(1, 2, 3)
    assert (bench.one("ImageFlip", image=image, flip_method="x-axis: vertically") == image[:, ::-1]).all()
    assert (bench.one("ImageFlip", image=image, flip_method="y-axis: horizontally") == image[:, :, ::-1]).all()
    turned = bench.one("ImageRotate", image=image, rotation="90 degrees")
    assert (turned[0, 0, -1] == image[0, 0, 0]).all()  # clockwise: the first corner comes to the right
    assert (bench.one("ImageRotate", image=turned, rotation="270 degrees") == image).all()
    assert (bench.one("ImageRotate", image=image, rotation="180 degrees") == image[:, ::-1, ::-1]).all()
    assert (bench.one("ImageRotate", image=image, rotation="none") == image).all()


def test_image_pad_for_outpaint_softens_towards_the_picture(bench: RecordingContext) -> None:
    image = pictures(1, 10, 12)
    padded, mask = bench.run("ImagePadForOutpaint", image=image, left=8, top=0, right=0, bottom=0, feathering=4)
    assert padded.shape == (1, 10, 20, 3)
    assert (padded[:, :, 8:] == image).all()
    assert (padded[:, :, :8] == 0.5).all()
    assert mask.shape == (1, 10, 20)
    assert mask[0, 0] == pytest.approx([1] * 8 + [1, 9 / 16, 4 / 16, 1 / 16] + [0] * 8)


def test_image_pad_for_outpaint_does_not_soften_a_small_picture(bench: RecordingContext) -> None:
    _, mask = bench.run("ImagePadForOutpaint", image=pictures(1, 8, 8), left=0, top=8, right=0, bottom=0, feathering=4)
    assert mask.sum() == 8 * 8


def test_image_batches(bench: RecordingContext) -> None:
    image = pictures(3, 2, 2)
    assert (bench.one("RepeatImageBatch", image=image, amount=2) == np.concatenate([image, image])).all()
    assert (bench.one("ImageFromBatch", image=image, batch_index=1, length=9) == image[1:]).all()
    assert (bench.one("ImageFromBatch", image=image, batch_index=9, length=1) == image[2:]).all()
    assert bench.run("GetImageSize", image=image) == (2, 2, 3)


def test_masks(bench: RecordingContext) -> None:
    mask = bench.one("SolidMask", value=0.25, width=3, height=2)
    assert mask.shape == (1, 2, 3)
    assert (bench.one("InvertMask", mask=mask) == 0.75).all()
    assert bench.one("MaskToImage", mask=mask).shape == (1, 2, 3, 3)
    image = pictures(1, 2, 2, channels=4)
    for index, channel in enumerate(["red", "green", "blue", "alpha"]):
        assert (bench.one("ImageToMask", image=image, channel=channel) == image[..., index]).all()


def test_composite_pastes_what_fits(bench: RecordingContext) -> None:
    below, above = pictures(2, 4, 4), pictures(1, 3, 3, channels=4, seed=1)
    result = bench.one("ImageCompositeMasked", destination=below, source=above, x=2, y=3, resize_source=False)
    assert (result[:, 3:, 2:] == above[:, :1, :2, :3]).all()
    assert (result[:, :3] == below[:, :3]).all()
    outside = bench.one("ImageCompositeMasked", destination=below, source=above, x=4, y=9, resize_source=False)
    assert (outside == below).all()


def test_composite_follows_the_mask(bench: RecordingContext) -> None:
    below, above = np.zeros((1, 2, 2, 3), np.float32), np.ones((1, 1, 1, 3), np.float32)
    mask = floats([[0, 1], [0.5, 1]])
    result = bench.one("ImageCompositeMasked", destination=below, source=above, x=0, y=0, resize_source=True, mask=mask)
    assert (result[0, :, :, 0] == mask[0]).all()


def test_values(bench: RecordingContext) -> None:
    for name, value in [("Int", 7), ("Float", 0.5), ("String", "a"), ("StringMultiline", "a\nb"), ("Boolean", True)]:
        assert bench.one(f"Primitive{name}", value=value) == value
    assert bench.one("StringConcatenate", string_a="a", string_b="b", delimiter=", ") == "a, b"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("as it is", "as it is"),
        (None, "None"),
        (True, "True"),
        (0.5, "0.5"),
        ({"a": [1]}, '{\n    "a": [\n        1\n    ]\n}'),
        (floats([0, 1], [2, 3]), "tensor([[0., 1.],\n        [2., 3.]])"),
        ({"waveform": floats(0.5)}, "{'waveform': tensor([0.5000])}"),
        ((floats(1),), "(tensor([1.]),)"),
        ([floats(1), "x"], "[tensor([1.]), 'x']"),
    ],
)
def test_preview_any(bench: RecordingContext, source: object, text: str) -> None:
    assert bench.ui("PreviewAny", source=source) == {"text": [text]}


def test_a_tensor_looks_like_one_of_torch() -> None:
    sigmas = floats(14.6146, 7.5, 0)
    assert tensor_text(sigmas) == "tensor([14.6146,  7.5000,  0.0000])"
    large = tensor_text(np.zeros((1, 64, 64, 3), dtype=np.float32))
    assert large.startswith(
        "tensor([[[[0., 0., 0.],\n          [0., 0., 0.],\n          [0., 0., 0.],\n          ...,\n"
    )
    assert describe(3) == "3"


def test_test_work_reports_steps_and_previews(bench: RecordingContext) -> None:
    image = pictures(1, 4, 6)
    (result,) = bench.run("TestWork", image=image, seconds=0.4, steps=4, preview=True, fail_at=0)
    assert result is image
    assert bench.slept == [0.1] * 4
    assert [step[:2] for step in bench.steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    preview = bench.steps[0][2]
    assert preview is not None
    kind, picture, longest_side = preview
    assert (kind, picture.size, longest_side) == ("JPEG", (6, 4), 512)


def test_test_work_fails_after_its_step(bench: RecordingContext) -> None:
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory\. Tried to allocate 20\.00 MiB \(simulated\)$"):
        bench.run("TestWork", image=pictures(1, 4, 4), seconds=0.1, steps=5, preview=False, fail_at=2)
    assert bench.steps == [(1, 5, None), (2, 5, None)]


def test_test_work_can_be_interrupted(bench: RecordingContext) -> None:
    bench.interrupt_after = 2
    with pytest.raises(InterruptProcessingException):
        bench.run("TestWork", image=pictures(1, 4, 4), seconds=0.1, steps=5, preview=False, fail_at=0)
    assert len(bench.steps) == 2
