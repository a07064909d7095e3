"""Nodes of the emulator that imitate models: loaders, texts, latents, samplers, decoders, 3D."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_emulator.node_api import ImageBatch, InterruptProcessingException
from comfy_emulator.nodes.conditioning import Conditioning
from comfy_emulator.nodes.latents import Latent
from comfy_emulator.nodes.loaders import Clip, Model, Vae
from comfy_emulator.nodes.placeholder import landscape, with_banner
from comfy_emulator.nodes.sampling import STEP_SECONDS
from tests.support.comfyui.node_context import RecordingContext, floats, pictures

CHECKPOINT = "sd_xl_base_1.0.safetensors"
VAE = Vae(CHECKPOINT)


@pytest.fixture
def bench(tmp_path: Path) -> RecordingContext:
    return RecordingContext(tmp_path)


def k_sample(bench: RecordingContext, latent: Latent, **changes: Any) -> Latent:
    inputs = {
        "model": Model(CHECKPOINT),
        "seed": 42,
        "steps": 3,
        "cfg": 8.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": Conditioning(("a lighthouse",)),
        "negative": Conditioning(("blurry",)),
        "denoise": 1.0,
    }
    result = bench.one("KSampler", latent_image=latent, **{**inputs, **changes})
    assert isinstance(result, Latent)
    return result


def empty(bench: RecordingContext, width: int = 64, height: int = 64, batch_size: int = 1) -> Latent:
    latent = bench.one("EmptyLatentImage", width=width, height=height, batch_size=batch_size)
    assert isinstance(latent, Latent)
    return latent


def decode(bench: RecordingContext, latent: Latent) -> ImageBatch:
    images = bench.one("VAEDecode", samples=latent, vae=VAE)
    assert isinstance(images, np.ndarray)
    return images


def test_text_to_image_from_checkpoint_to_picture(bench: RecordingContext) -> None:
    model, clip, vae = bench.run("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    clip = bench.one("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)
    model, clip = bench.run(
        "LoraLoader", model=model, clip=clip, lora_name="l.safetensors", strength_model=1.0, strength_clip=0.0
    )
    assert model.settings == ("lora l.safetensors 1.0",)
    assert clip.settings == ("layer -2",)
    positive = bench.one("CLIPTextEncode", text="a lighthouse", clip=clip)
    negative = bench.one("ConditioningZeroOut", conditioning=positive)
    assert (positive.text, negative.text) == ("a lighthouse", "")
    latent = k_sample(bench, empty(bench, 512, 256, 2), model=model, positive=positive, negative=negative)
    images = bench.one("VAEDecode", samples=latent, vae=vae)
    assert images.shape == (2, 256, 512, 3)
    assert images.dtype == np.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert (images[0] != images[1]).any()


def test_samplers_report_steps_with_small_previews(bench: RecordingContext) -> None:
    k_sample(bench, empty(bench, 512, 1024), steps=4)
    assert [step[:2] for step in bench.steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert bench.slept == [STEP_SECONDS] * 4
    for _, _, preview in bench.steps:
        assert preview is not None
        kind, picture, longest_side = preview
        assert (kind, picture.size, longest_side) == ("JPEG", (64, 128), 512)


def test_a_sampler_can_be_interrupted(bench: RecordingContext) -> None:
    bench.interrupt_after = 2
    with pytest.raises(InterruptProcessingException):
        k_sample(bench, empty(bench), steps=5)
    assert len(bench.steps) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 43},
        {"positive": Conditioning(("a mill",))},
        {"negative": Conditioning(("sharp",))},
        {"model": Model("other.safetensors")},
        {"model": Model(CHECKPOINT, ("lora x 1.0",))},
        {"cfg": 7.5},
        {"steps": 4},
        {"sampler_name": "ddim"},
        {"scheduler": "karras"},
    ],
)
def test_the_picture_depends_on_everything_and_nothing_else(bench: RecordingContext, changes: dict[str, Any]) -> None:
    usual = decode(bench, k_sample(bench, empty(bench)))
    assert (decode(bench, k_sample(bench, empty(bench))) == usual).all()
    assert (decode(bench, k_sample(bench, empty(bench), **changes)) != usual).any()


def test_no_denoise_changes_nothing(bench: RecordingContext) -> None:
    latent = empty(bench)
    assert k_sample(bench, latent, denoise=0.0) is latent
    assert bench.steps == []


@pytest.mark.parametrize(("start", "end", "taken"), [(0, 10000, 10), (4, 10000, 6), (0, 3, 3), (8, 2, 0)])
def test_k_sampler_advanced_takes_its_part_of_the_steps(
    bench: RecordingContext, start: int, end: int, taken: int
) -> None:
    bench.one(
        "KSamplerAdvanced",
        model=Model(CHECKPOINT),
        add_noise="enable",
        noise_seed=1,
        steps=10,
        cfg=8.0,
        sampler_name="euler",
        scheduler="normal",
        positive=Conditioning(("x",)),
        negative=Conditioning(()),
        latent_image=empty(bench),
        start_at_step=start,
        end_at_step=end,
        return_with_leftover_noise="disable",
    )
    assert [step[:2] for step in bench.steps] == [(number, taken) for number in range(1, taken + 1)]


@pytest.mark.parametrize(("steps", "denoise", "length"), [(20, 1.0, 21), (8, 0.5, 9), (8, 0.0, 0)])
def test_basic_scheduler(bench: RecordingContext, steps: int, denoise: float, length: int) -> None:
    sigmas = bench.one("BasicScheduler", model=Model(CHECKPOINT), scheduler="simple", steps=steps, denoise=denoise)
    assert sigmas.shape == (length,)
    assert all(after < before for before, after in itertools.pairwise(sigmas))
    assert not length or sigmas[-1] == 0


def test_flux_from_loaders_to_picture(bench: RecordingContext) -> None:
    model = bench.one("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
    model = bench.one("LoraLoaderModelOnly", model=model, lora_name="l", strength_model=0.5)
    model = bench.one("ModelSamplingFlux", model=model, max_shift=1.15, base_shift=0.5, width=64, height=64)
    clip = bench.one("DualCLIPLoader", clip_name1="l", clip_name2="t5", type="flux", device="default")
    assert clip.names == ("l", "t5")
    vae = bench.one("VAELoader", vae_name="ae.safetensors")
    text = bench.one("CLIPTextEncodeFlux", clip=clip, clip_l="a mill", t5xxl="a mill", guidance=3.5)
    text = bench.one("FluxGuidance", conditioning=text, guidance=2.0)
    assert text.text == "a mill"
    latent = bench.one("EmptySD3LatentImage", width=128, height=64, batch_size=1)
    assert latent.samples.shape == (1, 16, 8, 16)
    output, denoised = bench.run(
        "SamplerCustomAdvanced",
        noise=bench.one("RandomNoise", noise_seed=5),
        guider=bench.one("BasicGuider", model=model, conditioning=text),
        sampler=bench.one("KSamplerSelect", sampler_name="euler"),
        sigmas=bench.one("BasicScheduler", model=model, scheduler="simple", steps=2, denoise=1.0),
        latent_image=latent,
    )
    assert output is denoised
    assert len(bench.steps) == 2
    assert bench.one("VAEDecode", samples=output, vae=vae).shape == (1, 64, 128, 3)


def test_sampler_custom_and_the_other_loaders(bench: RecordingContext) -> None:
    clip = bench.one("TripleCLIPLoader", clip_name1="a", clip_name2="b", clip_name3="c")
    assert clip == Clip(("a", "b", "c"))
    assert bench.one("CLIPLoader", clip_name="a", type="sd3") == Clip(("a",), ("type sd3",))
    text = bench.one("CLIPTextEncodeHunyuanDiT", clip=clip, bert="one", mt5xl="two")
    both = bench.one("ConditioningCombine", conditioning_1=text, conditioning_2=Conditioning(("three",)))
    assert both.text == "one two three"
    model = bench.one("ModelSamplingSD3", model=Model("m"), shift=3.0)
    guider = bench.one("CFGGuider", model=model, positive=both, negative=text, cfg=4.0)
    assert (guider.positive, guider.negative, guider.cfg) == (both, text, 4.0)
    output, _ = bench.run(
        "SamplerCustom",
        model=model,
        add_noise=True,
        noise_seed=7,
        cfg=4.0,
        positive=both,
        negative=text,
        sampler=bench.one("KSamplerSelect", sampler_name="euler"),
        sigmas=floats(10, 5, 1, 0),
        latent_image=empty(bench),
    )
    assert [step[:2] for step in bench.steps] == [(1, 3), (2, 3), (3, 3)]
    assert output.samplings[0].seed == 7


def test_control_net_binds_both_conditionings(bench: RecordingContext) -> None:
    positive, negative = Conditioning(("a",)), Conditioning(("b",))
    inputs = {
        "positive": positive,
        "negative": negative,
        "control_net": bench.one("ControlNetLoader", control_net_name="canny"),
        "image": pictures(1, 8, 8),
        "start_percent": 0.0,
        "end_percent": 1.0,
    }
    assert bench.run("ControlNetApplyAdvanced", strength=0.0, **inputs) == (positive, negative)
    bound = bench.run("ControlNetApplyAdvanced", strength=0.5, vae=VAE, **inputs)
    assert [len(conditioning.settings) for conditioning in bound] == [1, 1]


def test_image_to_image_keeps_the_source_to_be_seen(bench: RecordingContext) -> None:
    source = np.zeros((1, 128, 131, 3), np.float32)
    source[:, :, 66:] = 1
    encoded = bench.one("VAEEncode", pixels=source, vae=VAE)
    assert encoded.samples.shape == (1, 4, 16, 16)
    images = decode(bench, k_sample(bench, encoded, denoise=0.5))
    assert images.shape == (1, 128, 128, 3)
    assert images[0, :64, 70:].mean() - images[0, :64, :60].mean() > 0.5


def test_inpainting_paints_only_under_the_mask(bench: RecordingContext) -> None:
    source, mask = np.ones((1, 64, 64, 3), np.float32), np.zeros((1, 64, 64), np.float32)
    mask[:, :, :32] = 1
    encoded = bench.one("VAEEncodeForInpaint", pixels=source, vae=VAE, mask=mask, grow_mask_by=0)
    assert (encoded.noise_mask == mask[:, np.newaxis]).all()
    images = decode(bench, k_sample(bench, encoded))
    assert (images[0, :40, 40:] == 1).all()
    assert (images[0, :40, :32] != 0.5).any()
    masked = bench.one("SetLatentNoiseMask", samples=empty(bench), mask=mask)
    assert masked.noise_mask.shape == (1, 1, 64, 64)


@pytest.mark.parametrize(("by", "width"), [(0, 1), (1, 1), (5, 5)])
def test_inpainting_grows_the_mask(bench: RecordingContext, by: int, width: int) -> None:
    mask = np.zeros((1, 32, 32), np.float32)
    mask[0, 16, 16] = 1
    encoded = bench.one("VAEEncodeForInpaint", pixels=pictures(1, 32, 32), vae=VAE, mask=mask, grow_mask_by=by)
    assert encoded.noise_mask.shape == (1, 1, 32, 32)
    assert encoded.noise_mask.sum() == width * width


def test_latents_are_scaled_as_latents(bench: RecordingContext) -> None:
    latent = k_sample(bench, empty(bench, 128, 64))
    upscale = {"samples": latent, "upscale_method": "bislerp"}
    assert bench.one("LatentUpscaleBy", scale_by=1.5, **upscale).samples.shape == (1, 4, 12, 24)
    assert bench.one("LatentUpscale", width=0, height=0, crop="disabled", **upscale) is latent
    assert bench.one("LatentUpscale", width=256, height=0, crop="disabled", **upscale).samples.shape == (1, 4, 16, 32)
    assert bench.one("LatentUpscale", width=0, height=128, crop="center", **upscale).samples.shape == (1, 4, 16, 32)
    assert bench.one("LatentUpscale", width=8, height=8, crop="center", **upscale).samples.shape == (1, 4, 8, 8)
    assert bench.one("RepeatLatentBatch", samples=latent, amount=3).samples.shape == (3, 4, 8, 16)


def test_the_second_pass_stays_near_the_first(bench: RecordingContext) -> None:
    first = k_sample(bench, empty(bench, 128, 128))
    second = k_sample(bench, first, seed=9, denoise=0.2)
    difference = np.abs(decode(bench, first)[:, :64] - decode(bench, second)[:, :64])
    assert 0 < difference.max() <= 0.21


def test_videos_have_frames_that_move(bench: RecordingContext) -> None:
    latent = bench.one("EmptyHunyuanLatentVideo", width=64, height=32, length=9, batch_size=1)
    assert latent.samples.shape == (1, 16, 3, 4, 8)
    tiles = {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    frames = bench.one("VAEDecodeTiled", samples=k_sample(bench, latent), vae=VAE, **tiles)
    assert frames.shape == (9, 32, 64, 3)
    assert (frames[0] != frames[8]).any()


def test_a_latent_is_printed_as_the_dictionary_it_is_in_comfyui(bench: RecordingContext) -> None:
    (text,) = bench.ui("PreviewAny", source=empty(bench))["text"]
    assert text.startswith("{'samples': tensor([[[[0., 0., 0., 0., 0., 0., 0., 0.],\n          [0., 0., ")
    assert text.endswith("0., 0.]]]])}")


def test_latents_are_saved_as_safetensors_and_loaded(bench: RecordingContext) -> None:
    latent = k_sample(bench, empty(bench))
    ui = bench.ui("SaveLatent", samples=latent, filename_prefix="latents/x")
    assert ui == {"latents": [{"filename": "x_00001_.latent", "subfolder": "latents", "type": "output"}]}
    content = bench.file(ui["latents"][0]).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"]["prompt"] == json.dumps(bench.prompt)
    assert header["latent_tensor"] == {"dtype": "F32", "shape": [1, 4, 8, 8], "data_offsets": [0, 1024]}
    assert header["latent_format_version_0"]["shape"] == [0]
    loaded = bench.one("LoadLatent", latent="latents/x_00001_.latent [output]")
    assert (loaded.samples == latent.samples).all()
    assert (decode(bench, loaded) != decode(bench, empty(bench))).any()


def test_a_latent_file_of_the_first_version_is_rescaled(bench: RecordingContext) -> None:
    from safetensors.numpy import save_file

    save_file({"latent_tensor": np.full((1, 4, 8, 8), 0.18215, np.float32)}, bench.input_dir / "old.latent")
    assert bench.one("LoadLatent", latent="old.latent").samples == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "factor"), [("RealESRGAN_x4plus.pth", 4), ("2x-Fancy.pth", 2), ("model_x2.pth", 2), ("plain.pth", 4)]
)
def test_upscaling_with_a_model(bench: RecordingContext, name: str, factor: int) -> None:
    model = bench.one("UpscaleModelLoader", model_name=name)
    result = bench.one("ImageUpscaleWithModel", upscale_model=model, image=pictures(2, 16, 24))
    assert result.shape == (2, 16 * factor, 24 * factor, 3)
    assert [step[:2] for step in bench.steps] == [(1, 2), (2, 2)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.lists(st.text(max_size=80), max_size=3))
def test_the_banner_fits_any_size_and_text(width: int, height: int, details: list[str]) -> None:
    picture = landscape("any", width, height)
    assert picture.shape == (height, width, 3)
    assert 0 <= np.min(picture) <= np.max(picture) <= 1
    labelled = with_banner(picture, details)
    assert labelled.shape == picture.shape
    assert labelled.dtype == np.float32
    if width >= 64 and height >= 32:
        foot, title = labelled[-10:], floats(1, 214 / 255, 92 / 255)
        assert foot.mean() < picture[-10:].mean() or foot.mean() < 0.3
        assert np.abs(labelled - title).sum(axis=-1).min() < 0.6


def test_the_banner_leaves_most_of_the_picture(bench: RecordingContext) -> None:
    latent = k_sample(bench, empty(bench, 512, 512))
    images = decode(bench, latent)
    bare = landscape(f"{latent.samplings[0].key} #0", 512, 512)
    assert np.abs(images[0, :384] - bare[:384]).max() <= 1 / 255
    assert images[0, 440:].mean() < bare[440:].mean()


def test_three_dimensions_from_latent_to_file(bench: RecordingContext) -> None:
    latent = bench.one("EmptyLatentHunyuan3Dv2", resolution=64, batch_size=2)
    assert latent.samples.shape == (2, 64, 64)
    sampled = k_sample(bench, latent)
    assert [step[2] for step in bench.steps] == [None] * 3
    voxels = bench.one("VAEDecodeHunyuan3D", samples=sampled, vae=VAE, num_chunks=8000, octree_resolution=16)
    assert voxels.shape == (2, 17, 17, 17)
    meshes = bench.one("VoxelToMeshBasic", voxel=voxels, threshold=0.6)
    corners = meshes[0].vertices[meshes[0].faces]
    volume = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert volume == pytest.approx((voxels[0] > 0.6).sum() * (2 / 17) ** 3, rel=1e-4)  # positive: faces look outwards
    saved = bench.ui("SaveGLB", mesh=meshes, filename_prefix="mesh/x")["3d"]
    assert [entry["filename"] for entry in saved] == ["x_00001_.glb", "x_00002_.glb"]
    content = bench.file(saved[0]).read_bytes()
    assert struct.unpack("<4sII", content[:12]) == (b"glTF", 2, len(content))
    length, kind = struct.unpack("<I4s", content[12:20])
    scene = json.loads(content[20 : 20 + length])
    assert kind == b"JSON"
    assert "no model ran" in scene["asset"]["generator"]
    assert scene["accessors"][1]["count"] == meshes[0].faces.size
    binary_length, binary_kind = struct.unpack("<I4s", content[20 + length : 28 + length])
    assert (binary_length, binary_kind) == (scene["buffers"][0]["byteLength"], b"BIN\0")
    assert len(content) == 28 + length + binary_length


def test_an_empty_grid_makes_one_triangle_without_extent(bench: RecordingContext) -> None:
    (mesh,) = bench.one("VoxelToMeshBasic", voxel=np.zeros((1, 4, 4, 4), np.float32), threshold=0.6)
    assert (mesh.vertices.shape, mesh.faces.shape) == ((1, 3), (1, 3))
