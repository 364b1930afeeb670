"""What a file is found to be agrees with diffusers' own table of families, and its types are rows
of the model table.
"""

import pytest
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type

from backends.files import denoiser_families
from backends.files.denoiser_families import DENOISER_PREFIXES, recognize_denoiser
from backends.files.recognition import recognize
from backends.files.weight_headers import Header
from backends.model_table import read_table

FAMILIES = {
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "flux3": "FLUX.3",
    "chroma": "Chroma",
    "sd3": "Stable Diffusion 3",
    "z-image-turbo": "Z-Image",
    "lumina2": "Lumina 2",
    "wan": "Wan",
    "wan_vace": "Wan VACE",
    "wan_animate": "Wan Animate",
    "qwen-image-2.1": "Qwen-Image 2.1",
    "krea2": "Krea 2",
    "mochi-1-preview": "Mochi",
    "hunyuan-video": "HunyuanVideo",
    "hidream": "HiDream",
    "minimax-h3": "MiniMax",
    "stable_cascade_stage_c": "Stable Cascade",
}
"""diffusers' name of a family -> ours."""


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name in FAMILIES for key in listed(CHECKPOINT_KEY_NAMES[name])],
)
def test_the_names_that_diffusers_knows_a_family_by_are_known_here(name: str, key: str) -> None:
    plain = key.removeprefix(DENOISER_PREFIXES[0])
    for prefix in ("", *DENOISER_PREFIXES):
        found = recognize_denoiser(Header(shapes={prefix + plain: (8, 8)}))
        assert found is not None and FAMILIES[name] in found.title


UNET = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": (320,),
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}
ATTENTION = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"
PUBLISHED = {
    "v1": (
        {CHECKPOINT_KEY_NAMES["v1"]: (320, 640, 1, 1), ATTENTION: (320, 768)},
        ("sd1", "sd2", "ad"),
    ),
    "v2": ({ATTENTION: (320, 1024)}, ("sd2", "sd1", "ad")),
    "inpainting": ({FIRST_CONV: (320, 9, 3, 3), ATTENTION: (320, 768)}, ("sd1", "sd2")),
    "inpainting_v2": ({FIRST_CONV: (320, 9, 3, 3), ATTENTION: (320, 1024)}, ("sd2", "sd1")),
    "instruct-pix2pix": ({FIRST_CONV: (320, 8, 3, 3), ATTENTION: (320, 768)}, ("pix2pix",)),
    "xl_base": (
        {
            CHECKPOINT_KEY_NAMES["xl_base"]: (1280,),
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        },
        ("sdxl",),
    ),
    "xl_refiner": (
        {
            CHECKPOINT_KEY_NAMES["xl_refiner"]: (1280,),
            "model.diffusion_model.label_emb.0.0.weight": (1536, 2560),
            "model.diffusion_model.input_blocks.9.0.op.weight": (1536,),
        },
        (),
    ),
    "upscale": (
        {
            CHECKPOINT_KEY_NAMES["upscale"]: (1024,),
            "model.diffusion_model.label_emb.weight": (1000, 1024),
            FIRST_CONV: (256, 7, 3, 3),
        },
        ("sdup",),
    ),
}
"""diffusers' name of a single file's kind -> tensors of the published one that decide it, and the
types that run it.
"""


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_single_files_of_the_original_code_are_told_apart_as_diffusers_does(kind: str) -> None:
    tensors, types = PUBLISHED[kind]
    shapes = UNET | tensors
    stand_ins = {name: _Shaped(shape) for name, shape in shapes.items()}
    assert infer_diffusers_model_type(stand_ins) == kind
    assert recognize(Header(shapes=shapes)).types == types


class _Shaped:
    """All that diffusers looks at of a tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def test_types_of_all_families_are_rows_of_the_model_table() -> None:
    unets = [
        family
        for family in vars(denoiser_families).values()
        if isinstance(family, denoiser_families._UNetFamily)
    ]
    transformers = {name for _, name, _ in denoiser_families._TRANSFORMERS}
    types = {name for family in unets for name in family.types}
    variants = {**denoiser_families._WIDER, **denoiser_families._SPECIAL}.values()
    types |= {name for _, names in variants for name in names}
    assert types <= set(read_table())
    classes = {name for spec in read_table().values() for name in spec.fits["denoiser"]}
    # transformers with the names of FLUX.1 or Wan, told by the checkpoint's own
    alike = {f"{name}Transformer2DModel" for name in ("OvisImage", "Bria", "LongCatImage")}
    alike |= {"SkyReelsV2Transformer3DModel"}
    unets = {name for name in classes if "UNet" in name}
    assert classes - unets - alike - {"Transformer2DModel"} <= transformers
