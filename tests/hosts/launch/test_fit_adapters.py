"""ControlNets, IP-Adapters, motion modules and LoRAs that do not fit are refused before anything
starts, and so are files that hold no weights.
"""

import json
from pathlib import Path

import pytest

from tests.altered import changed, linked
from tests.checkpoints import (
    IP_ADAPTER_FILE,
    checkpoint,
    controlnet,
    ip_adapter,
    lora,
    motion_adapter,
    single_file,
)
from tests.checkpoints.adapters import CONTROLNETS, IP_ADAPTERS
from tests.hosts.launch.fit_planning import TABLE, plan, refusal, shares_a_unet, weights


@pytest.mark.parametrize("name", [name for name, spec in TABLE.items() if spec.controlnet])
def test_a_controlnet_of_another_type_is_refused(name: str) -> None:
    for other in CONTROLNETS:
        options = {"control_net": str(controlnet(other))}
        if name == other or shares_a_unet(name, other):
            assert plan(name, **options).load.control_net
        else:
            assert f"--control_net={controlnet(other)} " in refusal(name, **options)


def test_controlnets_of_the_same_class_are_told_apart_by_their_widths() -> None:
    message = refusal("sdxl", control_net=str(controlnet("sd1")))
    assert "has cross_attention_dim=32, but the unet of --type=sdxl has 96" in message
    message = refusal("sd1", control_net=str(controlnet("sdxl")))
    assert "has cross_attention_dim=96, but the unet of --type=sd1 has 32" in message


NO_CONTROLNET = {
    "a T2I-Adapter": {
        "adapter.conv_in.weight": (8, 192, 3, 3),
        "adapter.body.0.resnets.0.block1.weight": (8, 8, 3, 3),
    },
    "a control-LoRA": {
        "lora_controlnet": (1,),
        "input_blocks.0.0.up": (8, 4),
        "input_blocks.0.0.down": (4, 4),
    },
    "a ControlNetXS": {
        "controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3),
        "down_blocks.0.ctrl_to_base.0.weight": (8, 8, 1, 1),
    },
    "a union ControlNet": {
        "task_embedding": (8, 320),
        "controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3),
    },
    "a SparseCtrl ControlNet": {
        "controlnet_cond_embedding.weight": (8, 4, 1, 1),
        "down_blocks.0.motion_modules.0.norm.weight": (8,),
    },
    "a ControlNet-LLLite": {"lllite_unet_down_blocks.conditioning1.0.weight": (8, 3, 4, 4)},
    "a LoRA": {"lora_unet_x.lora_down.weight": (4, 8), "lora_unet_x.lora_up.weight": (8, 4)},
    "an IP-Adapter": {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)},
    "a denoiser of Stable Diffusion 1": {
        "conv_in.weight": (8, 4, 3, 3),
        "time_embedding.linear_1.weight": (8, 8),
        "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
    },
}


@pytest.mark.parametrize("kind", list(NO_CONTROLNET))
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "zimage"])
def test_what_is_no_controlnet_is_refused_by_its_name(kind: str, name: str, tmp_path: Path) -> None:
    file = weights(tmp_path / "net" / "diffusion_pytorch_model.safetensors", NO_CONTROLNET[kind])
    for given in (file, str(tmp_path / "net")):
        message = refusal(name, control_net=given)
        assert f"--control_net={given} is {kind}" in message and f"--type={name} needs a" in message


@pytest.mark.parametrize(
    ("name", "fields", "what"),
    [
        (
            "sdxl",
            {"_class_name": "ControlNetUnionModel"},
            "is a ControlNetUnionModel, but --type=sdxl needs a ControlNetModel",
        ),
        (
            "sd1",
            {"_class_name": "T2IAdapter"},
            "is a T2IAdapter, but --type=sd1 needs a ControlNetModel",
        ),
        ("sd1", {"_class_name": "ControlNetXSAdapter"}, "is a ControlNetXSAdapter, but --type=sd1"),
        (
            "sd1",
            {"_class_name": "SparseControlNetModel"},
            "is a SparseControlNetModel, but --type=sd1",
        ),
        (
            "sd3",
            {"_class_name": "FluxControlNetModel"},
            "is a FluxControlNetModel, but --type=sd3 needs an SD3ControlNetModel",
        ),
        ("flux", {"num_mode": 10}, "is a union ControlNet of 10 kinds of images"),
        (
            "sd3",
            {"extra_conditioning_channels": 1},
            "takes 1 more channels than an image (extra_conditioning_channels)",
        ),
        (
            "qwenimage",
            {"extra_condition_channels": 4},
            "takes 4 more channels than an image (extra_condition_channels)",
        ),
        (
            "zimage",
            {"dim": 64},
            "has dim=64, but the transformer of --type=zimage has 32",
        ),
        ("hy", {"cross_attention_dim_t5": 64}, "has cross_attention_dim_t5=64"),
        ("flux", {"num_attention_heads": 8}, "has num_attention_heads * attention_head_dim=64"),
        ("sd1", {"block_out_channels": [8, 8, 8, 8]}, "has block_out_channels=[8, 8, 8, 8]"),
    ],
)
def test_a_controlnet_folder_is_judged_by_its_configuration(
    name: str, fields: dict, what: str, tmp_path: Path
) -> None:
    folder = changed(controlnet(name), tmp_path / "net", "config.json", **fields)
    assert what in refusal(name, control_net=str(folder))


@pytest.mark.parametrize("name", list(IP_ADAPTERS))
def test_an_ip_adapter_of_another_type_or_encoder_is_refused(name: str, tmp_path: Path) -> None:
    for other in IP_ADAPTERS:
        options = {"ip_adapter": str(ip_adapter(other) / IP_ADAPTER_FILE)}
        is_same = json.loads(
            (checkpoint(name) / TABLE[name].denoiser / "config.json").read_text()
        ).get(TABLE[name].ip_adapter["width"])
        if name == other or shares_a_unet(name, other):
            assert plan(name, **options).load.ip_adapter
        elif is_same != 32 or "sd3" in (name, other):
            refusal(name, **options)
    narrow = changed(
        ip_adapter(name),
        tmp_path / "ip",
        "models/image_encoder/config.json",
        projection_dim=40,
        hidden_size=40,
    )
    message = refusal(name, ip_adapter=str(narrow / IP_ADAPTER_FILE))
    assert (
        "takes image embeddings of width 32, but the image encoder" in message
        and "has 40" in message
    )


FACE_ID = {
    "FaceID": {
        "image_proj.norm.weight": (8,),
        "image_proj.proj.0.weight": (8, 512),
        "ip_adapter.0.to_q_lora.down.weight": (4, 8),
    },
    "FaceID plus": {
        "image_proj.perceiver_resampler.proj_in.weight": (8, 8),
        "ip_adapter.1.to_k_ip.weight": (8, 8),
    },
}


@pytest.mark.parametrize("kind", list(FACE_ID))
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_face_id_is_refused_by_its_name(kind: str, name: str, tmp_path: Path) -> None:
    file = weights(tmp_path / "ip.safetensors", FACE_ID[kind])
    assert "is a FaceID IP-Adapter: it needs the identity vectors of a face recogniser" in refusal(
        name, ip_adapter=file
    )
    assert "is a LoRA" in refusal(name, ip_adapter=str(lora(name)))


def test_motion_modules_for_another_unet_are_refused(tmp_path: Path) -> None:
    sd1 = checkpoint("sd1")
    assert plan("ad", sd1, motion_adapter=str(motion_adapter())).load.motion_adapter
    wide = changed(
        motion_adapter(), tmp_path / "wide", "config.json", block_out_channels=[8, 16, 16]
    )
    assert "has block_out_channels=[8, 16, 16], but the unet of --type=ad" in refusal(
        "ad", sd1, motion_adapter=str(wide)
    )
    pia = changed(motion_adapter(), tmp_path / "pia", "config.json", conv_in_channels=9)
    assert "first layer for 9 channels (PIA)" in refusal("ad", sd1, motion_adapter=str(pia))
    name = "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"
    file = weights(tmp_path / "mm.safetensors", {name: (320,)})
    assert "has block_out_channels[0]=320" in refusal("ad", sd1, motion_module=file)
    assert "is a ControlNet" in refusal("ad", sd1, motion_adapter=str(controlnet("sd1")))


NO_WEIGHTS = {
    "a pointer of Git LFS": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a web page": "\n<!DOCTYPE html><html><title>Sign in</title></html>",
    "empty": "",
    "not a file of weights": "hello",
}


@pytest.mark.parametrize("what", list(NO_WEIGHTS))
@pytest.mark.parametrize(
    "option", ["checkpoint", "vae", "unet", "gguf_model", "control_net", "ip_adapter", "lora"]
)
def test_what_is_no_file_of_weights_says_what_it_is(option: str, what: str, tmp_path: Path) -> None:
    is_other = what == "not a file of weights" and option != "checkpoint"
    file = tmp_path / ("x.txt" if is_other else "x.safetensors")
    file.write_text(NO_WEIGHTS[what])
    message = (
        refusal("sdxl", file) if option == "checkpoint" else refusal("sdxl", **{option: str(file)})
    )
    assert message.startswith(f"--{option}={file} ")
    if option != "checkpoint" or not what.startswith("not"):
        assert what in message


def test_a_pointer_in_a_folder_is_told_for_every_component(tmp_path: Path) -> None:
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        folder = linked(checkpoint("sdxl"), tmp_path / component)
        (file,) = (folder / component).glob("*.safetensors")
        file.unlink()
        file.write_text(NO_WEIGHTS["a pointer of Git LFS"])
        assert f"--checkpoint={file} cannot be read (safetensors): it is a pointer" in refusal(
            "sdxl", folder
        )


def test_another_file_as_lora_is_refused_before_the_start(tmp_path: Path) -> None:
    message = refusal("sdxl", lora=str(single_file("sdxl")))
    assert "is a checkpoint" in message and "Give it with --checkpoint" in message
