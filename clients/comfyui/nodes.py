"""Two nodes: one selects a host, the other generates on it.

ComfyUI requires INPUT_TYPES, RETURN_TYPES, FUNCTION and CATEGORY of a node.
"""

import io
import json
import queue
import threading
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from diffusion_client import HostError, Job, JobState
from PIL import Image

from . import hosts
from .images import decode_frames, encode_image, encode_mask

CATEGORY = "diffusion-launcher"
OWN = "the model's own"
LOOK_EVERY_S = 0.1
PREVIEW_SIDE = 512
ARRAY_TYPE = "application/x-npy"
MAX_SEED = 2**63 - 1
IMAGES = {
    "control_image": ("control_image", "--control_net"),
    "ip_image": ("ip_adapter_image", "--ip_adapter"),
}
"""Image input -> the launch argument that a host needs to accept it."""


def _look() -> None:
    """Raise ComfyUI's own exception once its user cancels."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class DiffusionHost:
    """The host at an address, started if none answers there."""

    CATEGORY = CATEGORY
    FUNCTION = "choose"
    RETURN_TYPES = ("DIFFUSION_HOST",)
    RETURN_NAMES = ("host",)
    DESCRIPTION = "A diffusion-launcher host: a running one, or one to start on this machine."

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
                    [hosts.ANY, *hosts.models()],
                    {
                        "default": hosts.ANY,
                        "tooltip": "Refuse to generate if the host serves another.",
                    },
                ),
                "arguments": (
                    "STRING",
                    {
                        "default": "--type=sdxl --checkpoint=/path/to/model",
                        "tooltip": "Of the host to start.",
                    },
                ),
                "api_key": ("STRING", {"default": "", "tooltip": "If the host wants one."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = hosts.ANY) -> bool:
        """Accept any model: its host may not run yet. The choice is checked when it generates."""
        return True

    def choose(
        self,
        address: str,
        start: bool,
        model: str = hosts.ANY,
        arguments: str = "",
        api_key: str = "",
    ) -> tuple[hosts.HostChoice]:
        choice = hosts.HostChoice(
            address=address.strip().rstrip("/"),
            model=model,
            arguments=arguments if start else None,
            api_key=api_key.strip(),
        )
        choice.client(_look)  # here, so that this node fails if there is no host
        return (choice,)


class DiffusionSampler:
    """Generates one image or video, with previews. ComfyUI's cancel ends it on all ranks."""

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
                "scheduler": ([OWN, *hosts.schedulers()], {"default": OWN}),
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
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, scheduler: str = OWN) -> bool:
        """Accept any sampler: its host may not run yet. The host checks the choice."""
        return True

    def sample(self, host: hosts.HostChoice, **inputs: Any) -> tuple[torch.Tensor, str]:
        client = host.client(_look)
        job = client.submit(**_fields(inputs, client.request_schema()["properties"]))
        _follow(job)
        return decode_frames(job.result(ARRAY_TYPE)), json.dumps(job.state.settings)


def _fields(inputs: dict[str, Any], taken: dict[str, Any]) -> dict[str, Any]:
    """Convert the node's inputs to a request. HostError for an image that the host could not use.

    taken: the fields that the host reads.
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
            raise HostError("this host's model starts from no image. Disconnect `image`.", status=0)
        fields[name] = encode_image(inputs["image"])
        if name == "init_image":
            fields["strength"] = inputs.get("strength", 0.8)
    if inputs.get("mask") is not None:
        if "mask_image" not in taken or "init_image" not in fields:
            raise HostError(
                "a mask needs an image, and a model that can inpaint. Connect an image, or "
                "disconnect the mask.",
                status=0,
            )
        fields["mask_image"] = encode_mask(inputs["mask"])
    for name, (field, argument) in IMAGES.items():
        if inputs.get(name) is not None and field not in taken:
            raise HostError(
                f"this host takes no {name}. Start it with {argument}, or disconnect it.", status=0
            )
        if inputs.get(name) is not None:
            fields[field] = encode_image(inputs[name])
    return fields


def _follow(job: Job) -> None:
    """Show progress and previews until the job is done.

    ComfyUI's cancel cancels the job on the host and is raised again.
    """
    states: queue.SimpleQueue[JobState | HostError | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(job, states), daemon=True).start()
    bar = comfy.utils.ProgressBar(1)
    try:
        while True:
            _look()
            try:
                state = states.get(timeout=LOOK_EVERY_S)
            except queue.Empty:
                continue
            if state is None:
                break
            if isinstance(state, HostError):
                raise state
            _show(bar, state)
    # ComfyUI's interruption too, which is not an Exception in some versions
    except BaseException:
        job.cancel()
        raise
    if job.state.state != "done":
        raise HostError(job.state.error or job.state.state, status=500)


def _listen(job: Job, states: "queue.SimpleQueue[JobState | HostError | None]") -> None:
    """Read the job's states in a thread of its own.

    A step may take long, and ComfyUI's cancel must be noticed meanwhile.
    """
    try:
        for state in job.follow(previews=True):
            states.put(state)
    except HostError as error:
        states.put(error)
    except OSError as error:
        states.put(HostError(f"the connection to the host was lost: {error}", status=0))
    states.put(None)


def _show(bar: Any, state: JobState) -> None:
    if not state.steps:
        return
    preview = (
        ("JPEG", Image.open(io.BytesIO(state.preview)), PREVIEW_SIDE)
        if state.preview is not None
        else None
    )
    bar.update_absolute(state.step, state.steps, preview)
