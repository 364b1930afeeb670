"""The throw-away image after loading, which pays for first-use costs before a client waits."""

from PIL import Image

from backends.model_table import ModelSpec
from backends.request import GenerateRequest, LoadRequest


def prewarm_request(spec: ModelSpec, load: LoadRequest) -> GenerateRequest:
    """Return a request of `load.prewarm_steps` steps at the default size, with the inputs that the
    type requires.
    """
    height, width = load.height or spec.height, load.width or spec.width
    image = (
        Image.new("RGB", (width // spec.upscale, height // spec.upscale), "gray")
        if "image" in spec.requires
        else None
    )
    gray = Image.new("RGB", (width, height), "gray")
    return GenerateRequest(
        prompt="warm-up",
        seed=0,
        num_inference_steps=load.prewarm_steps,
        height=height,
        width=width,
        image=image,
        init_image=gray if "init_image" in spec.requires else None,
        mask_image=gray if "mask_image" in spec.requires else None,
        control_image=gray if load.control_net else None,
        ip_adapter_image=gray if load.ip_adapter else None,
    )
