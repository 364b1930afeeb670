"""Files of a launch that do not fit the type are refused before anything starts: what --check and
the launcher say of them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.errors import ConfigError
from backends.model_table import read_table
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan, plan_start
from tests.altered import changed, linked
from tests.checkpoints import (
    IP_ADAPTER_FILE,
    NAMES,
    checkpoint,
    controlnet,
    gguf,
    ip_adapter,
    lora,
    motion_adapter,
    single_file,
)
from tests.checkpoints.adapters import CONTROLNETS, IP_ADAPTERS
from tests.checkpoints.single_file import GGUF_NAMES
from tests.every_type import EVERY_TYPE
from tests.hosts.harness import run_launcher

TABLE = read_table()
SAME_PARTS = {"sd1", "sd2", "ad"}
"""Types that run each other's checkpoints: one UNet in three pipelines."""


def plan(type_name: str | None, folder: Path | None = None, **options: object) -> StartPlan:
    values = {"type": type_name, "checkpoint": str(folder or checkpoint(type_name)), **options}
    return plan_start(Settings.from_values(values), TABLE, num_gpus=0, num_ranks=1)


def refusal(type_name: str | None, folder: Path | None = None, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(type_name, folder, **options)
    return str(caught.value)


def without(source: Path, folder: Path, component: str) -> Path:
    changed(source, folder, **{component: [None, None]})
    return folder


def weights(path: Path, tensors: dict[str, object], metadata: dict[str, str] | None = None) -> str:
    """A file of zeros: name -> shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: torch.zeros(shape) for name, shape in tensors.items()}, path, metadata=metadata
    )
    return str(path)


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_folder_runs_as_its_own_type_and_as_no_other(name: str) -> None:
    folder = checkpoint(name)
    assert plan(name, folder).spec.name == name
    for other in TABLE:
        options = {"motion_adapter": str(motion_adapter())} if other == "ad" else {}
        if (
            other == name
            or {name, other} <= SAME_PARTS - {"ad"}
            or TABLE[name].pipeline in TABLE[other].also
            or (other == "ad" and name in SAME_PARTS)
        ):
            assert plan(other, folder, **options).spec.name == other
            continue
        message = refusal(other, folder)
        if TABLE[other].pipeline == TABLE[name].pipeline:  # they differ in their denoisers
            assert "transformer_2" in message and f"Give --type={name}" in message
            continue
        assert f"--checkpoint={folder} is a" in message and f"--type={other} needs a" in message
        assert f"Give --type={name}" in message or (
            name in SAME_PARTS and "Give --type=" in message
        )


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("sd1", "LatentConsistencyModelPipeline"),
        ("sd1", "StableDiffusionControlNetPipeline"),
        ("sd1", "StableDiffusionPAGPipeline"),
        ("sd1", "StableDiffusionAdapterPipeline"),
        ("sdxl", "StableDiffusionXLInstructPix2PixPipeline"),
        ("flux", "FluxControlPipeline"),
        ("qwenimage", "QwenImageLayeredPipeline"),
        ("zimage", "ZImageOmniPipeline"),
        ("pixs", "PixArtSigmaPAGPipeline"),
        ("hy", "HunyuanDiTPAGPipeline"),
        ("svd", "I2VGenXLPipeline"),
        ("ad", "AnimateDiffSDXLPipeline"),
        ("sd3", "StableDiffusion3PAGPipeline"),
        ("sdup", "StableDiffusionLatentUpscalePipeline"),
    ],
)
def test_a_class_that_makes_something_else_of_the_same_parts_is_refused(
    name: str, class_name: str, tmp_path: Path
) -> None:
    folder = changed(checkpoint(name), tmp_path / "model", _class_name=class_name)
    message = refusal(name, folder)
    assert (
        f" {class_name}, but --type={name} needs" in message
        and "Leave --type out to run it as diffusers has it" in message
        and f"or give a checkpoint of {TABLE[name].title}." in message
    )
    assert plan(None, folder).spec.pipeline == class_name


@pytest.mark.parametrize(
    ("name", "class_name"), [(name, other) for name in NAMES for other in TABLE[name].also]
)
def test_img2img_and_inpainting_classes_of_the_same_parts_are_taken(
    name: str, class_name: str, tmp_path: Path
) -> None:
    folder = changed(checkpoint(name), tmp_path / "model", _class_name=class_name)
    assert plan(name, folder).spec.name == name


def test_an_editing_class_whose_denoiser_takes_an_image_runs_without_the_row(tmp_path: Path):
    folder = changed(
        checkpoint("sdxl", in_channels=8),
        tmp_path / "model",
        _class_name="StableDiffusionXLInstructPix2PixPipeline",
    )
    assert "StableDiffusionXLInstructPix2PixPipeline" in refusal("sdxl", folder)
    spec = plan(None, folder).spec
    assert spec.is_generic and {"image", "prompt"} <= set(spec.takes)


@pytest.mark.parametrize("name", EVERY_TYPE)
@pytest.mark.parametrize("channels", [9, 8, 384, 36])
def test_a_denoiser_with_other_channels_is_refused(
    name: str, channels: int, tmp_path: Path
) -> None:
    denoiser = TABLE[name].denoiser
    config = json.loads((checkpoint(name) / denoiser / "config.json").read_text())
    right, masked = config.get("in_channels"), TABLE[name].fits.get("masked")
    if "channels" not in TABLE[name].fits or channels == right or (channels == 9 and masked):
        return
    folder = changed(
        checkpoint(name), tmp_path / "model", f"{denoiser}/config.json", in_channels=channels
    )
    message = refusal(name, folder)
    assert (
        f"has a {denoiser} with {channels} input channels, but --type={name} needs {right}"
        in message
    )
    if channels == 9 and right == 4:
        assert "it is made for inpainting and also takes a mask" in message


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in NAMES for key in TABLE[name].fits["text"]]
)
def test_a_denoiser_for_encoders_of_another_width_is_refused(
    name: str, key: str, tmp_path: Path
) -> None:
    denoiser = TABLE[name].denoiser
    folder = changed(checkpoint(name), tmp_path / "model", f"{denoiser}/config.json", **{key: 40})
    assert f"has a {denoiser} with {key}=40, but the checkpoint's parts give" in refusal(
        name, folder
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param(name, key, marks=() if name in NAMES else pytest.mark.slow)
        for name, spec in TABLE.items()
        for key in spec.fits.get("is", {})
    ],
)
def test_a_denoiser_of_another_kind_is_refused(name: str, key: str, tmp_path: Path) -> None:
    denoiser = TABLE[name].denoiser
    folder = changed(
        checkpoint(name), tmp_path / "model", f"{denoiser}/config.json", **{key: "else"}
    )
    assert f"has a {denoiser} with {key}='else', but --type={name} needs" in refusal(name, folder)


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_part_that_is_null_missing_or_without_weights_is_named(name: str, tmp_path: Path) -> None:
    encoder = next(
        part for part in ("text_encoder", "image_encoder") if (checkpoint(name) / part).is_dir()
    )
    for component in (encoder, "vae", TABLE[name].denoiser, "scheduler"):
        folder = without(checkpoint(name), tmp_path / f"null-{component}", component)
        assert f"has no {component}, which --type={name} needs" in refusal(name, folder)
        folder = changed(checkpoint(name), tmp_path / f"gone-{component}")
        shutil.rmtree(folder / component)
        assert f"names a {component}, but the folder {folder / component} is missing" in refusal(
            name, folder
        )
    folder = changed(checkpoint(name), tmp_path / "empty")
    for file in (folder / encoder).glob("*.safetensors"):
        file.unlink()
    assert f"holds no weights of its {encoder}" in refusal(name, folder)


def test_t5_of_sd3_may_be_left_out(tmp_path: Path) -> None:
    folder = changed(
        checkpoint("sd3"), tmp_path / "model", text_encoder_3=[None, None], tokenizer_3=[None, None]
    )
    assert plan("sd3", folder).spec.name == "sd3"


def test_a_download_that_broke_off_is_refused(tmp_path: Path) -> None:
    folder = changed(checkpoint("flux"), tmp_path / "model")
    index = {"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    assert plan("flux", folder).spec.name == "flux"  # the index of a precision that was left out
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(
        folder / "transformer" / "x-00001-of-00002.safetensors"
    )
    assert "lacks transformer/diffusion_pytorch_model-00002-of-00002.safetensors" in refusal(
        "flux", folder
    )
    shutil.copy(checkpoint("flux") / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "transformer" / "x-00001-of-00002.safetensors").rename(
        folder / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
        content[: len(content) // 2]
    )
    assert "cannot be read (safetensors): its tensors end at byte" in refusal("flux", folder)


def test_the_refiner_is_refused_by_its_name(tmp_path: Path) -> None:
    fields = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    folder = changed(checkpoint("sdxl"), tmp_path / "model", **fields)
    assert "is the refiner of Stable Diffusion XL: it continues another model's latents" in refusal(
        "sdxl", folder
    )
    config = {"projection_class_embeddings_input_dim": 5 * 8 + 64, "addition_time_embed_dim": 8}
    folder = changed(checkpoint("sdxl"), tmp_path / "other", "unet/config.json", **config)
    assert (
        "projection_class_embeddings_input_dim=104, but the checkpoint's parts give 112"
        in refusal("sdxl", folder)
    )


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_vae_of_another_type_is_refused_as_a_folder_and_as_a_file(name: str) -> None:
    own = json.loads((checkpoint(name) / "vae" / "config.json").read_text())
    for other in ("sd1", "flux", "svd", "qwenimage", "wan_t2v", "flux2"):
        folder = checkpoint(other) / "vae"
        config = json.loads((folder / "config.json").read_text())
        if config["_class_name"] != own["_class_name"]:
            assert (
                f"has a VAE of class {config['_class_name']}, but --type={name} needs"
                in refusal(name, vae=str(folder))
            )
        elif config.get("latent_channels") != own.get("latent_channels"):
            assert f"has {config['latent_channels']} latent channels" in refusal(
                name, vae=str(folder)
            )
            message = refusal(name, vae=str(folder / "diffusion_pytorch_model.safetensors"))
            assert (
                f"has {config['latent_channels']} latent channels" in message
                and "--vae_config=CONFIG.JSON" in message
            )


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux", "wan_t2v"])
def test_what_is_no_whole_vae_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    tiny = {"encoder.layers.0.weight": (8, 3, 3, 3), "decoder.layers.0.weight": (8, 4, 3, 3)}
    original = {"1.weight": (8, 4, 3, 3), "3.conv.0.weight": (8, 8, 3, 3)}
    for number, tensors in enumerate((tiny, original)):
        message = refusal(name, vae=weights(tmp_path / f"{number}.safetensors", tensors))
        assert (
            "is a tiny VAE (TAESD)" in message
            and f"Give a VAE ({TABLE[name].fits['vae']}) made for" in message
        )
    (tmp_path / "taesd").mkdir()
    (tmp_path / "taesd" / "config.json").write_text(
        '{"_class_name": "AutoencoderTiny", "latent_channels": 4}'
    )
    shutil.copy(
        tmp_path / "0.safetensors", tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"
    )
    assert "has a VAE of class AutoencoderTiny" in refusal(name, vae=str(tmp_path / "taesd"))
    whole = load_file(checkpoint(name) / "vae" / "diffusion_pytorch_model.safetensors")
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        save_file(
            {key: value for key, value in whole.items() if half in key},
            tmp_path / "half.safetensors",
        )
        message = refusal(name, vae=str(tmp_path / "half.safetensors"))
        assert f"is a VAE with no {other}, only its {half}" in message
    assert (
        "is a LoRA"
        in (message := refusal(name, vae=str(lora(name if name != "wan_t2v" else "flux"))))
        and "--lora" in message
    )


def shares_a_unet(one: str, other: str) -> bool:
    return {one, other} <= SAME_PARTS


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


ALIKE = (
    {"pixa", "pixs"},
    {"flux", "flux_kontext"},
    {"wan_t2v", "skyreels"},
    {"qwenimage", "qwenimage_edit"},
    {"qwenimage", "qwenimage_edit_plus"},
)
"""Types whose denoisers differ in nothing but their training."""


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_a_gguf_of_another_type_is_refused_with_its_own(name: str) -> None:
    for other in GGUF_NAMES:
        if other == name:
            assert plan(name, gguf_model=str(gguf(other))).load.gguf_model
        elif not shares_a_unet(name, other) and {name, other} not in ALIKE:
            message = refusal(name, gguf_model=str(gguf(other)))
            assert "--gguf_model=" in message and f"--type={other}" in message


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_denoiser_of_another_type_is_refused_with_its_own(name: str) -> None:
    denoiser = TABLE[name].denoiser
    for other in (
        "sd1",
        "sdxl",
        "sdup",
        "svd",
        "sd3",
        "flux",
        "hy",
        "zimage",
        "qwenimage",
        "flux2",
        "wan_t2v",
        "pixs",
    ):
        folder = checkpoint(other) / TABLE[other].denoiser
        if other == name or shares_a_unet(name, other) or {name, other} in ALIKE:
            continue
        for given in (folder, folder / "diffusion_pytorch_model.safetensors"):
            message = refusal(name, **{denoiser: str(given)})
            assert f"--{denoiser}={given} " in message
    assert "is a VAE" in (
        message := refusal(
            name,
            **{denoiser: str(checkpoint("sd1") / "vae" / "diffusion_pytorch_model.safetensors")},
        )
    )
    assert "Give it with --vae" in message


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_denoiser_with_missing_or_unknown_weights_is_counted(name: str, tmp_path: Path) -> None:
    denoiser = TABLE[name].denoiser
    tensors = load_file(checkpoint(name) / denoiser / "diffusion_pytorch_model.safetensors")
    *rest, first = sorted(tensors)
    save_file(
        {key: tensors[key] for key in rest} | {"more": torch.zeros(1)}, tmp_path / "x.safetensors"
    )
    message = refusal(name, **{denoiser: str(tmp_path / "x.safetensors")})
    assert f"1 tensor is missing ({first})" in message and "1 tensor is unknown (more)" in message


@pytest.mark.parametrize(
    ("title", "tensors"),
    [
        ("a text encoder or language model", {"token_embd.weight": (8, 8)}),
        (
            "a text encoder or language model",
            {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)},
        ),
        (
            "a denoiser of AuraFlow: no type runs this family",
            {"double_layers.0.attn.w2q.weight": (8,)},
        ),
        (
            "a denoiser of FLUX.1: it is made for depth or edges",
            {"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.weight": (8, 128)},
        ),
    ],
)
def test_a_file_of_a_family_that_no_type_runs_says_so(
    title: str, tensors: dict, tmp_path: Path
) -> None:
    file = weights(tmp_path / "x.safetensors", tensors)
    assert f"--transformer={file} is {title}" in refusal("flux", transformer=file)


def test_kontext_and_flux_are_told_apart_by_their_classes() -> None:
    assert "--type=flux needs a FluxPipeline. Give --type=flux_kontext." in refusal(
        "flux", checkpoint("flux_kontext")
    )
    assert "Give --type=flux." in refusal("flux_kontext", checkpoint("flux"))


def test_kontext_is_told_by_its_metadata(tmp_path: Path) -> None:
    tensors = {"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.weight": (8, 64)}
    file = weights(tmp_path / "x.safetensors", tensors, {"modelspec.title": "FLUX.1 Kontext [dev]"})
    assert "is a denoiser of FLUX.1 (kontext): it edits a reference image" in refusal(
        "flux", transformer=file
    )


def beside(file: Path, folder: Path, name: str) -> Path:
    """A single file with the configuration of its folder beside it."""
    target = folder / "model.safetensors"
    target.symlink_to(file)
    ignored = ("*.safetensors",) if TABLE[name].denoiser == "unet" else ()
    shutil.copytree(checkpoint(name), folder / "model", ignore=shutil.ignore_patterns(*ignored))
    return target


SINGLE = [name for name, spec in TABLE.items() if spec.single_file]


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_runs_as_its_own_type_and_as_no_other(name: str, tmp_path: Path) -> None:
    file = beside(single_file(name), tmp_path, name)
    assert plan(None, file).spec.name == name
    for other in SINGLE:
        if other == name or shares_a_unet(name, other):
            assert plan(other, file).spec.name == other
        else:
            assert f"Give --type={name}" in refusal(other, file)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_single_file_without_denoiser_or_text_encoders_says_so(name: str, tmp_path: Path) -> None:
    tensors = load_file(single_file(name))
    parts = {
        "denoiser": "model.diffusion_model.",
        "text encoders": ("cond_stage_model.", "conditioner."),
    }
    for number, (what, prefix) in enumerate(parts.items()):
        (tmp_path / what).mkdir()
        file = beside(single_file(name), tmp_path / what, name)
        file.unlink()
        save_file(
            {key: value for key, value in tensors.items() if not key.startswith(prefix)}, file
        )
        message = refusal(name, file)
        assert ("and no denoiser" if number == 0 else "holds no text_encoder, and") in message


@pytest.mark.parametrize("channels", [8, 5])
def test_a_single_file_for_editing_or_depth_is_refused_with_the_reason(
    channels: int, tmp_path: Path
) -> None:
    file = beside(single_file("sd1"), tmp_path, "sd1")
    tensors = load_file(file)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, channels, 3, 3)
    file.unlink()
    save_file(tensors, file)
    title = f"with {channels} input channels"
    for message in (refusal("sd1", file), refusal(None, file)):
        # another type runs what edits images, from a folder
        is_known = channels == 8 and "folder in diffusers layout only" in message
        assert title in message and ("also takes" in message or is_known)


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


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"a": 1,', "is not JSON"),
        (b"[1]", "holds a list instead of an object"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"", "is not JSON"),
    ],
)
@pytest.mark.parametrize(
    "name",
    ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
     "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)  # fmt: skip
def test_a_broken_configuration_is_named(
    name: str, content: bytes, what: str, tmp_path: Path
) -> None:
    folder = linked(checkpoint("sdxl"), tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    for type_name in ("sdxl", None):
        message = refusal(type_name, folder)
        assert message.startswith(f"{folder / name} {what}"), message


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder_2", "scheduler", "tokenizer"])
def test_a_component_without_its_configuration_is_refused(component: str, tmp_path: Path) -> None:
    folder = linked(checkpoint("sdxl"), tmp_path / "model")
    for file in (folder / component).glob("*.json" if component != "tokenizer" else "*"):
        file.unlink()
    assert f"--checkpoint={folder} lacks {component}/" in refusal("sdxl", folder)


def test_another_file_as_lora_is_refused_before_the_start(tmp_path: Path) -> None:
    message = refusal("sdxl", lora=str(single_file("sdxl")))
    assert "is a checkpoint" in message and "Give it with --checkpoint" in message


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_the_type_follows_from_the_folder(name: str) -> None:
    start = plan(None, checkpoint(name))
    assert start.spec.name == name
    assert any(reason.startswith(f"type={name}: the checkpoint is a") for reason in start.reasons)


def test_the_type_of_an_sd1_folder_with_motion_modules_is_animatediff() -> None:
    assert plan(None, checkpoint("sd1"), motion_adapter=str(motion_adapter())).spec.name == "ad"


def test_a_file_that_does_not_say_what_it_is_needs_a_type(tmp_path: Path) -> None:
    file = weights(tmp_path / "x.safetensors", {"anything": (1,)})
    assert (
        f"--type is missing, and --checkpoint={file} does not say what it is. Allowed: sd1"
        in refusal(None, Path(file))
    )


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    assert f"--checkpoint={tmp_path} holds no model_index.json that names a pipeline" in refusal(
        None, tmp_path
    )


def test_the_launcher_refuses_in_one_line_with_exit_code_2() -> None:
    done = run_launcher("--type=sdxl", f"--checkpoint={checkpoint('sd1')}", "--check")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: --checkpoint={checkpoint('sd1')} is a StableDiffusionPipeline, but --type=sdxl "
        "needs a StableDiffusionXLPipeline. "
        "Give --type=sd1 or --type=sd2 or --type=ad."
    )
