"""The entry points: a checkpoint folder by name, the pipeline loaded from it, and arguments for a
short generation. See the package.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from backends.model_table import ModelSpec, read_table
from tests.checkpoints.cache import cached
from tests.checkpoints.gain import default_gain, scale_attention

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NAMES = (
    "ad",
    "sd1",
    "sd2",
    "sd3",
    "sdup",
    "sdxl",
    "svd",
    "flux",
    "flux_kontext",
    "hy",
    "pixa",
    "pixs",
    "zimage",
    "qwenimage",
    "flux2",
    "wan_t2v",
)
"""Types with a builder in pipelines.py. The others are built of their class's components."""
SD35_MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}


def checkpoint(
    name: str, *, seed: int = 0, attention_gain: float | None = None, **denoiser: object
) -> Path:
    """Return the folder of a tiny checkpoint of type `name`, float32, in the layout save_pretrained
    writes.

    seed: of the weights. attention_gain: see gain.py, also for the default; 1.0 leaves the weights
    as the classes initialise them.
    denoiser: fields of the UNet's or transformer's config that differ from the default
    (denoisers.py).
    """
    if name in read_table() and name not in NAMES and not denoiser and seed == 0:
        return _checkpoint_of_class(read_table()[name])
    if name not in NAMES:
        raise ValueError(f"No tiny checkpoint named {name!r}. Allowed: {', '.join(NAMES)}.")
    gain = default_gain(name) if attention_gain is None else attention_gain
    recipe = {"seed": seed, "attention_gain": gain, "denoiser": denoiser}
    return cached(name, recipe, lambda folder: _build(name, folder, **recipe))


def _checkpoint_of_class(spec: ModelSpec) -> Path:
    """Return the folder of a tiny pipeline of the row's class, with attention that matters, and
    with all denoisers of the row.
    """
    from tests.checkpoints.variants import base_of, variant

    plain, gain = variant(spec.pipeline), default_gain(spec.name)
    # a checkpoint that it is made of has scaled attention already
    is_scaled = base_of(spec.pipeline) is not None
    if is_scaled and not spec.other_denoisers:
        return plain

    def build(folder: Path) -> None:
        import torch

        from tests.checkpoints.saving import save

        pipe = _from_pretrained(plain)
        for part, module in pipe.components.items():
            if isinstance(module, torch.nn.Module) and part != "vae" and not is_scaled:
                scale_attention(module, gain)
        for number, part in enumerate(spec.other_denoisers):
            first = getattr(pipe, spec.denoiser)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number + 1)
                another = type(first).from_config(first.config)
            scale_attention(another, gain)
            without = {"image_encoder": None} if "image_encoder" in pipe.components else {}
            pipe.register_modules(**{part: another}, **without)
            pipe.register_to_config(boundary_ratio=0.9)
        save(pipe, folder)

    return cached(spec.name, {"of": plain.name, "gain": gain}, build)


def _from_pretrained(folder: Path) -> "DiffusionPipeline":
    """Load a checkpoint as plain diffusers does, with processors that need no torchvision."""
    from diffusers import DiffusionPipeline

    from backends.loading.processors import processors_without_torchvision

    index = json.loads((folder / "model_index.json").read_text())
    processors = processors_without_torchvision(folder, index)
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True, **processors)


def _build(
    name: str, folder: Path, *, seed: int, attention_gain: float, denoiser: dict[str, object]
) -> None:
    """Make the pipeline from `seed` alone, without touching the caller's random state, and save
    it.
    """
    import torch

    from tests.checkpoints.pipelines import BUILDERS
    from tests.checkpoints.saving import save

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = BUILDERS[name](**denoiser)
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and part != "vae":
            scale_attention(module, attention_gain)
    save(pipe, folder)


def load(name: str, **variant: object) -> "DiffusionPipeline":
    """Load checkpoint(name, **variant) on the CPU in float32, as plain diffusers does, with its
    progress bar off.
    """
    pipe = _from_pretrained(checkpoint(name, **variant))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(
    name: str,
    *,
    prompt: str = "a photo of a cat",
    size: int = 64,
    num_inference_steps: int = 2,
    seed: int = 0,
) -> dict[str, object]:
    """Return the arguments of a short generation with type `name`: square, `size` pixels, output as
    a numpy array in [0, 1].

    The upscaler starts from an image of a quarter of the size; svd takes an image and no prompt;
    both videos have 4 frames.
    """
    import torch

    arguments: dict[str, object] = {
        "num_inference_steps": num_inference_steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    if name != "svd":
        arguments["prompt"] = prompt
    if name == "sdup":
        return arguments | {"image": sample_image(size // 4)}
    arguments |= {"height": size, "width": size}
    if name == "svd":
        arguments |= {"image": sample_image(size), "num_frames": 4}
    if name == "ad":
        arguments |= {"num_frames": 4}
    if name == "wan_t2v":
        arguments |= {"num_frames": 5}  # one, and four times the latent frames after the first
    if name == "flux_kontext":
        arguments |= {"max_area": size * size}  # it scales the size to this area
    if name == "qwenimage":
        arguments |= {"negative_prompt": " "}  # guidance is off without one
    if name in ("hy", "pixa", "pixs"):
        arguments |= {
            "use_resolution_binning": False
        }  # else the size becomes the nearest of a list that starts at 512
    return arguments


def sample_image(size: int, *, seed: int = 0):
    """An RGB image with coarse structure (not pixel noise), so that resizing keeps it: 8 x 8 random
    colours, enlarged.
    """
    import numpy
    from PIL import Image

    colours = numpy.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
    return Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC)
