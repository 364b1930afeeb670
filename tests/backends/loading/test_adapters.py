"""LoRA, ControlNet and IP-Adapter on one device: scales, requests of their own, nothing left
behind, clear refusals.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.errors import ConfigError, RequestError, UnsupportedError
from backends.request import GenerateResult
from tests.backends.features import TABLE, loaded, request_for
from tests.checkpoints import (
    IP_ADAPTER_FILE,
    controlnet,
    gguf,
    ip_adapter,
    lora,
    motion_lora,
    sample_image,
)

SMALL = {"height": 64, "width": 64}


def draw(pipe, **fields) -> np.ndarray:
    return frames(pipe.generate(request_for(pipe.spec, **{**SMALL, **fields})))


def frames(result: GenerateResult) -> np.ndarray:
    return result.frames.astype(int)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def test_loras_act_together_in_any_order_and_a_request_replaces_them_for_itself_alone(
    tmp_path: Path,
) -> None:
    """Both files have the same stem, with dots in it."""
    paths = []
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        paths.append(
            str(
                shutil.copy(
                    lora("sd1", seed=seed, style="kohya"),
                    tmp_path / folder / "my.style.v1.safetensors",
                )
            )
        )
    plain = draw(loaded(TABLE["sd1"]))
    pipe = loaded(TABLE["sd1"], lora={paths[0]: 0.5, paths[1]: -0.3})
    both = draw(pipe)
    assert difference(both, plain) > 5
    assert difference(draw(loaded(TABLE["sd1"], lora={paths[1]: -0.3, paths[0]: 0.5})), both) <= 1
    one = draw(pipe, lora={paths[0]: 0.5})
    assert difference(one, both) > 5
    assert difference(one, draw(loaded(TABLE["sd1"], lora={paths[0]: 0.5}))) <= 1
    assert difference(draw(pipe, lora={}), plain) == 0
    assert difference(draw(pipe), both) == 0


def test_text_encoder_part_of_a_lora_acts(tmp_path: Path) -> None:
    weights = load_file(lora("sd1", style="kohya"))
    text_only = tmp_path / "text.safetensors"
    save_file(
        {key: tensor for key, tensor in weights.items() if key.startswith("lora_te")}, text_only
    )
    assert (
        difference(
            draw(loaded(TABLE["sd1"], lora={str(text_only): 1.0})), draw(loaded(TABLE["sd1"]))
        )
        > 5
    )


def kohya_names(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """peft's keys -> kohya's, with alpha at half the rank and the factors doubled, so that the
    effect is the same.
    """
    renamed = {}
    for key, tensor in weights.items():
        layer, factor = key.removeprefix(prefix + ".").removesuffix(".weight").rsplit(".", 1)
        flat = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{flat}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = tensor * (
            1 if factor == "lora_A" else 2
        )
        renamed[f"{flat}.alpha"] = torch.tensor(2.0)
    return renamed


@pytest.mark.parametrize("style", ["peft folder", "kohya", "pickle"])
def test_styles_of_keys_mean_the_same_where_diffusers_has_no_loader(
    tmp_path: Path, style: str
) -> None:
    weights = load_file(lora("pixa"))
    path = tmp_path / ("lora.bin" if style == "pickle" else "lora.safetensors")
    if style == "peft folder":
        save_file(
            {
                f"base_model.model.{key.removeprefix('transformer.')}": tensor
                for key, tensor in weights.items()
            },
            path,
        )
    elif style == "kohya":
        save_file(kohya_names(weights, "transformer"), path)
    else:
        torch.save(weights, path)
    want = draw(loaded(TABLE["pixa"], lora={str(lora("pixa")): 1.0}))
    assert difference(want, draw(loaded(TABLE["pixa"]))) > 5
    assert difference(draw(loaded(TABLE["pixa"], lora={str(path): 1.0})), want) <= 1


def test_factors_of_different_ranks_share_one_adapter(tmp_path: Path) -> None:
    weights = load_file(lora("pixa"))
    half = {}
    for number, (key, tensor) in enumerate(sorted(weights.items())):
        is_narrow = number // 2 % 2 == 0
        half[key] = (
            (tensor[:2] if ".lora_A." in key else tensor[:, :2]).contiguous()
            if is_narrow
            else tensor
        )
    save_file(half, tmp_path / "mixed.safetensors")
    mixed = draw(loaded(TABLE["pixa"], lora={str(tmp_path / "mixed.safetensors"): 1.0}))
    assert difference(mixed, draw(loaded(TABLE["pixa"]))) > 5


def test_motion_lora_acts_in_every_generation_whatever_lora_it_brings() -> None:
    spec, video = TABLE["ad"], {"num_frames": 2}
    plain, pipe = loaded(spec), loaded(spec, motion_lora={str(motion_lora()): 1.0})
    assert difference(draw(pipe, **video), draw(plain, **video)) > 5
    asked = {"lora": {str(lora("ad")): 0.5}, **video}
    assert difference(draw(pipe, **asked), draw(plain, **asked)) > 5


@pytest.mark.parametrize(
    ("name", "other", "why"),
    [
        ("sdxl", "sd1", r"is for a unet whose texts have a width of 32, but in this checkpoint it"),
        ("pixa", "hy", r"does not fit PixArt-.*: \d+ of \d+ keys are for layers"),
    ],
)
def test_a_lora_of_another_model_is_refused_with_the_reason(
    name: str, other: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        loaded(TABLE[name], lora={str(lora(other)): 1.0})


def test_a_request_whose_lora_does_not_fit_is_refused_and_leaves_nothing_behind() -> None:
    pipe = loaded(TABLE["pixa"])
    before = draw(pipe)
    with pytest.raises(RequestError, match="does not fit") as caught:
        draw(pipe, lora={str(lora("pixa")): 1.0, str(lora("hy")): 1.0})
    assert caught.value.field == "lora"
    assert difference(draw(pipe), before) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [({"a.weight": torch.ones(1)}, "holds no LoRA weights"), (None, "cannot be read")],
)
def test_a_file_without_lora_weights_is_refused(
    tmp_path: Path, content: dict[str, torch.Tensor] | None, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(content, path) if content else path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=message):
        loaded(TABLE["pixa"], lora={str(path): 1.0})


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Path("/")}, tmp_path / "x.bin")
    with pytest.raises(ConfigError, match="cannot be read"):
        loaded(TABLE["pixa"], lora={str(tmp_path / "x.bin"): 1.0})


def test_fused_loras_draw_the_same_and_leave_plain_layers() -> None:
    pipe = loaded(TABLE["sd1"], lora={str(lora("sd1", style="kohya")): 0.5})
    want = draw(pipe)
    pipe.loras.fuse()
    assert not [
        name for name, _ in pipe.pipe.unet.named_modules() if "lora" in name or "base_layer" in name
    ]
    assert difference(draw(pipe), want) <= 1


def test_control_images_scales_and_windows_are_the_requests() -> None:
    net, other = str(controlnet("hy")), str(controlnet("hy", seed=1))
    plain = draw(loaded(TABLE["hy"]))
    pipe = loaded(TABLE["hy"], control_net={net: 1.0})
    hint = {"control_image": sample_image(40)}
    assert difference(draw(pipe, **hint), plain) > 5
    assert difference(draw(pipe, **hint), draw(pipe, control_image=sample_image(40, seed=1))) > 5
    assert difference(draw(pipe, **hint, controlnet_conditioning_scale=0.0), plain) == 0
    two = loaded(TABLE["hy"], control_net={net: 1.0, other: 0.5})
    assert difference(draw(two, **hint), draw(pipe, **hint)) > 5
    assert (
        difference(draw(two, **hint, controlnet_conditioning_scale=[1.0, 0.0]), draw(pipe, **hint))
        <= 1
    )


def test_a_control_window_leaves_the_other_steps_alone() -> None:
    pipe = loaded(TABLE["sd1"], control_net={str(controlnet("sd1")): 1.0})
    asked = {"control_image": sample_image(40), "num_inference_steps": 4}
    whole, half = draw(pipe, **asked), draw(pipe, **asked, control_guidance_end=0.5)
    assert difference(whole, half) > 2
    assert difference(draw(pipe, **asked, controlnet_conditioning_scale=0.0), half) > 2


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({}, RequestError, "control_image is missing, but a ControlNet is loaded"),
        (
            {"control_image": [sample_image(8)] * 3},
            RequestError,
            "3 control images were sent for 1 ControlNets",
        ),
        (
            {"control_image": sample_image(8), "controlnet_conditioning_scale": [1.0, 2.0]},
            RequestError,
            "2 scales were sent for 1",
        ),
        (
            {"control_image": sample_image(8), "control_guidance_end": 0.5},
            UnsupportedError,
            "control_guidance_end is not available",
        ),
        (
            {"control_image": sample_image(8), "control_guidance_start": 1.0},
            UnsupportedError,
            "control_guidance_start is not available",
        ),
    ],
)
def test_refuses_requests_that_do_not_fit_the_controlnet(
    controlled, fields: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        draw(controlled, **fields)


@pytest.fixture(scope="module")
def controlled():
    return loaded(TABLE["hy"], control_net={str(controlnet("hy")): 1.0})


def test_a_control_window_must_begin_before_it_ends() -> None:
    pipe = loaded(TABLE["sd1"], control_net={str(controlnet("sd1")): 1.0})
    with pytest.raises(
        RequestError, match=r"control_guidance_start=0\.8 is not before control_guidance_end=0\.2"
    ):
        draw(
            pipe,
            control_image=sample_image(8),
            control_guidance_start=0.8,
            control_guidance_end=0.2,
        )


def test_ip_adapter_acts_on_packed_weights() -> None:
    adapter = {str(ip_adapter("sdxl") / IP_ADAPTER_FILE): 0.7}
    packed = {"gguf_model": str(gguf("sdxl", "Q4_0"))}
    plain = draw(loaded(TABLE["sdxl"], **packed))
    pipe = loaded(TABLE["sdxl"], **packed, ip_adapter=adapter)
    asked = {"ip_adapter_image": sample_image(40)}
    assert difference(draw(pipe, **asked, ip_adapter_scale=0.0), plain) <= 1
    assert difference(draw(pipe, **asked), plain) > 5


def test_ip_adapter_follows_its_images_and_the_requests_scale(tmp_path: Path) -> None:
    file = ip_adapter("sd1") / IP_ADAPTER_FILE
    plain, pipe = draw(loaded(TABLE["sd1"])), loaded(TABLE["sd1"], ip_adapter={str(file): 0.7})
    asked = {"ip_adapter_image": sample_image(40)}
    image = draw(pipe, **asked)
    assert difference(image, plain) > 5
    assert difference(image, draw(pipe, **asked, ip_adapter_scale=0.2)) > 5
    assert difference(draw(pipe, **asked, ip_adapter_scale=0.0), plain) <= 1
    assert (
        difference(draw(pipe, ip_adapter_image=[sample_image(40), sample_image(40, seed=1)]), image)
        > 5
    )
    assert difference(draw(pipe, **asked), image) == 0
    with pytest.raises(RequestError, match="ip_adapter_image is missing, but an IP"):
        draw(pipe)
    assert (
        difference(
            draw(loaded(TABLE["sd1"], ip_adapter={str(as_pickle(file, tmp_path)): 0.7}), **asked),
            image,
        )
        == 0
    )


def as_pickle(file: Path, folder: Path) -> Path:
    """The same IP-Adapter as a .bin of two dictionaries, in the layout with the image encoder in a
    neighbouring folder.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(file).items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    (folder / "sdxl_models").mkdir()
    shutil.copytree(file.parent / "image_encoder", folder / "models" / "image_encoder")
    torch.save(parts, folder / "sdxl_models" / "ip.bin")
    return folder / "sdxl_models" / "ip.bin"


def test_two_ip_adapters_act_together(tmp_path: Path) -> None:
    file = ip_adapter("flux") / IP_ADAPTER_FILE
    folder = tmp_path / "models"
    shutil.copytree(file.parent, folder)
    pipe = loaded(TABLE["flux"], ip_adapter={str(file): 0.7, str(folder / file.name): 0.7})
    asked = {"ip_adapter_image": sample_image(40)}
    one = draw(loaded(TABLE["flux"], ip_adapter={str(file): 0.7}), **asked)
    assert difference(draw(pipe, **asked), one) > 5


def test_an_ip_adapter_without_its_image_encoder_says_where_it_belongs(tmp_path: Path) -> None:
    shutil.copy(ip_adapter("sd1") / IP_ADAPTER_FILE, tmp_path / "ip.safetensors")
    with pytest.raises(
        ConfigError,
        match=(
            r"has no image encoder beside it. Put its folder with a config.json at one of: "
            r".*image_encoder"
        ),
    ):
        loaded(TABLE["sd1"], ip_adapter={str(tmp_path / "ip.safetensors"): 1.0})


def test_a_file_that_is_no_ip_adapter_or_one_of_another_type_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"has cross_attention_dim=32, but the unet of --type=sdxl has 96",
    ):
        loaded(TABLE["sdxl"], ip_adapter={str(ip_adapter("sd1") / IP_ADAPTER_FILE): 1.0})


def test_sd3_takes_one_image_only() -> None:
    pipe = loaded(TABLE["sd3"], ip_adapter={str(ip_adapter("sd3") / IP_ADAPTER_FILE): 1.0})
    with pytest.raises(
        UnsupportedError,
        match=r"2 images as ip_adapter_image are too many for Stable Diffusion 3 and 3\.5\. Send 1",
    ):
        draw(pipe, ip_adapter_image=[sample_image(8), sample_image(8)])
