"""Two nodes: one names a host, one generates images on it. latent_nodes.py has those that work with
latents. ComfyUI wants of a node: INPUT_TYPES, RETURN_TYPES, FUNCTION, CATEGORY.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from diffusion_client import PATIENCE_S, HostError

from . import hosts
from .following import follow, look
from .images import decode_frames, encode_image, encode_images, encode_mask
from .samplers import SAMPLERS

CATEGORY = "diffusion-launcher"
OWN = "the model's own"
ARRAY_TYPE = "application/x-npy"
MAX_SEED = 2**63 - 1
PATIENCE = (
    "INT",
    {
        "default": int(PATIENCE_S),
        "min": 0,
        "max": 86_400,
        "tooltip": "Seconds that a job waits for a host that restarts.",
    },
)
IMAGES = {
    "control_image": ("control_image", "--control_net"),
    "ip_image": ("ip_adapter_image", "--ip_adapter"),
}
"""Input -> the field of an image that a host takes only if it was started with this argument."""


class DiffusionHost:
    """The host at an address, or one that is started when none answers there."""

    CATEGORY = CATEGORY
    FUNCTION = "choose"
    RETURN_TYPES = ("DIFFUSION_HOST",)
    RETURN_NAMES = ("host",)
    DESCRIPTION = (
        "Which host of diffusion-launcher draws: one that runs, or one to start on this machine."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "address": ("STRING", {"default": hosts.DEFAULT_ADDRESS}),
                "start": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Start a host on this machine if none answers at the address.",
                    },
                ),
            },
            "optional": {
                "model": (
                    "STRING",
                    {
                        "default": hosts.ANY,
                        "tooltip": "Which of the host's models; any: its first.",
                    },
                ),
                "arguments": (
                    "STRING",
                    {
                        "default": "--type=sdxl",
                        "tooltip": "Of the host to start, such as --checkpoint=FOLDER.",
                    },
                ),
            },
        }

    def choose(
        self,
        address: str,
        start: bool,
        model: str = hosts.ANY,
        arguments: str = "",
    ) -> tuple[hosts.HostChoice]:
        choice = hosts.HostChoice(
            address=address.strip().rstrip("/"),
            model=model.strip() or hosts.ANY,
            arguments=arguments if start else None,
        )
        choice.client(look)  # here, so that it is this node that fails where there is no host
        return (choice,)


class DiffusionSampler:
    """One image or video, with previews of its steps; ComfyUI's cancel ends it on all ranks."""

    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "settings")
    DESCRIPTION = (
        "Draws on a host of diffusion-launcher. 0 (or -1 for guidance) is the model's own value."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 0, "min": 0, "max": 8192, "step": 8}
        return {
            "required": {
                "host": ("DIFFUSION_HOST",),
                "prompt": ("STRING", {"default": "", "multiline": True}),
                "negative_prompt": ("STRING", {"default": "", "multiline": True}),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True},
                ),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1}),
                "width": ("INT", size),
                "height": ("INT", size),
                "scheduler": ([OWN, *SAMPLERS], {"default": OWN}),
            },
            "optional": {
                "image": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "To start from; for videos and upscalers the image to animate "
                            "or to enlarge."
                        )
                    },
                ),
                "mask": (
                    "MASK",
                    {"tooltip": "White where the image may change; all of it if not connected."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 0.8,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "How much of it may change.",
                    },
                ),
                "control_image": ("IMAGE",),
                "ip_image": ("IMAGE",),
                "frames": ("INT", {"default": 0, "min": 0, "max": 512}),
                "patience": PATIENCE,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, scheduler: str = OWN) -> bool:
        """A workflow may name a sampler in another spelling: the host checks it."""
        return True

    def sample(self, host: hosts.HostChoice, **inputs: Any) -> tuple[torch.Tensor, str]:
        host = replace(host, patience_s=inputs.get("patience", PATIENCE_S))
        client = host.client(look)
        job = client.submit(**_fields(inputs, client.request_schema()["properties"]))
        follow([job])
        return decode_frames(job.result(ARRAY_TYPE)), json.dumps(job.state.settings)


def _fields(inputs: dict[str, Any], taken: dict[str, Any]) -> dict[str, Any]:
    """The node's inputs -> the request. taken: the fields that this host reads. HostError for an
    image it could not use.
    """
    fields = {name: inputs[name] for name in ("prompt", "negative_prompt", "seed")}
    chosen = {
        "num_inference_steps": inputs["steps"] or None,
        "guidance_scale": inputs["guidance"] if inputs["guidance"] >= 0 else None,
        "width": inputs["width"] or None,
        "height": inputs["height"] or None,
        "scheduler": inputs["scheduler"] if inputs["scheduler"] != OWN else None,
        "num_frames": inputs.get("frames") or None,
    }
    fields |= {name: value for name, value in chosen.items() if value is not None}
    if inputs.get("image") is not None:
        name = next((name for name in ("image", "init_image") if name in taken), None)
        if name is None:
            raise HostError(
                "this host's model starts from no image. Disconnect `image`.", status=400
            )
        fields[name] = encode_image("image", inputs["image"])
        if name == "init_image":
            fields["strength"] = inputs.get("strength", 0.8)
    if inputs.get("mask") is not None:
        if "mask_image" not in taken or "init_image" not in fields:
            raise HostError(
                "a mask needs an image, and a model that can inpaint. Connect an image, or "
                "disconnect the mask.",
                status=400,
            )
        fields["mask_image"] = encode_mask("mask", inputs["mask"])
    return fields | image_fields(inputs, taken)


def image_fields(inputs: dict[str, Any], taken: dict[str, Any]) -> dict[str, Any]:
    """The images for ControlNet and IP-Adapter. HostError for one that the host could not use."""
    fields = {}
    for name, (field, argument) in IMAGES.items():
        if inputs.get(name) is not None and field not in taken:
            raise HostError(
                f"this host takes no {name}. Start it with {argument}, or disconnect it.",
                status=400,
            )
        if inputs.get(name) is not None:
            fields[field] = encode_images(inputs[name])
    return fields
