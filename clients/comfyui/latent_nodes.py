"""Nodes with which a host takes a graph's place of KSampler: latents in and out, text or
conditioning, LoRAs of the host.
"""

import base64
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusion_client import PATIENCE_S, Client, HostError

from . import hosts
from .following import follow, look
from .images import frames_of
from .nodes import CATEGORY, MAX_SEED, OWN, PATIENCE, image_fields
from .samplers import ALIASES, SAMPLERS, SCHEDULES

WHOLE_TYPE = "application/x-npz"
LAST_STEP = 10_000
"""KSamplerAdvanced's value of end_at_step for the end."""
PIXELS_PER_LATENT = 8
WEIGHT = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}
SHARE = {"min": 0.0, "max": 1.0, "step": 0.001}
NOT_SENT = ("area", "mask", "control", "gligen", "start_percent", "end_percent", "hooks")
"""What nodes put into a conditioning that a host would have to compute with."""

Conditioning = list[Any]
"""ComfyUI's: pairs of float (1, T, D) and facts, among them `pooled_output`, float (1, P)."""


class DiffusionLora:
    """Adds a LoRA of the host's --lora_dir to those of the sampler."""

    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("DIFFUSION_LORAS",)
    RETURN_NAMES = ("loras",)
    DESCRIPTION = "A LoRA from the folder that the host was started with (--lora_dir)."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        name = {"default": "", "tooltip": "Its file, with or without the ending."}
        return {
            "required": {"name": ("STRING", name), "weight": ("FLOAT", WEIGHT)},
            "optional": {"loras": ("DIFFUSION_LORAS",)},
        }

    def add(
        self, name: str, weight: float, loras: dict[str, float] | None = None
    ) -> tuple[dict[str, float]]:
        return ({**(loras or {}), name.strip(): weight},)


class DiffusionKSampler:
    """KSampler and KSamplerAdvanced on a host, for each latent of a batch."""

    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT", "IMAGE")
    RETURN_NAMES = ("latent", "image")
    DESCRIPTION = (
        "KSampler on a host of diffusion-launcher. Latent i of a batch has the seed + i. The image "
        "is decoded by the host, on all its ranks."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"default": "", "multiline": True, "tooltip": "Unless a conditioning is connected."}
        step = {"min": 0, "max": LAST_STEP}
        return {
            "required": {
                "host": ("DIFFUSION_HOST",),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True},
                ),
                "steps": ("INT", {"default": 20, "min": 1, "max": 1000}),
                "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "sampler_name": ([OWN, *SAMPLERS], {"default": OWN}),
                "scheduler": (list(SCHEDULES), {"default": "normal"}),
                "latent_image": ("LATENT",),
                "denoise": ("FLOAT", {"default": 1.0, **SHARE, "step": 0.01}),
            },
            "optional": {
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "positive_text": ("STRING", text),
                "negative_text": ("STRING", text),
                "loras": ("DIFFUSION_LORAS",),
                "start_at_step": (
                    "INT",
                    {"default": 0, **step, "tooltip": "Above 0 no noise is added to the latent."},
                ),
                "end_at_step": (
                    "INT",
                    {"default": LAST_STEP, **step, "tooltip": "Before the last: stays noisy."},
                ),
                "control_image": ("IMAGE",),
                "control_strength": ("FLOAT", WEIGHT),
                "control_start": ("FLOAT", {"default": 0.0, **SHARE}),
                "control_end": ("FLOAT", {"default": 1.0, **SHARE}),
                "ip_image": ("IMAGE",),
                "ip_strength": ("FLOAT", WEIGHT),
                "patience": PATIENCE,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, sampler_name: str = OWN, scheduler: str = "normal") -> bool | str:
        """A workflow may name a sampler in another spelling: the host checks it."""
        if scheduler not in SCHEDULES:
            return f"scheduler {scheduler!r} is not available. Allowed: {', '.join(SCHEDULES)}."
        return True

    def sample(
        self, host: hosts.HostChoice, latent_image: dict[str, Any], **inputs: Any
    ) -> tuple[dict[str, Any], torch.Tensor]:
        client = replace(host, patience_s=inputs.get("patience", PATIENCE_S)).client(look)
        taken = client.request_schema()["properties"]
        fields = _fields(inputs, client, taken)
        starts = _starts(latent_image, inputs, taken)
        jobs = [client.submit(**fields, **start) for start in starts]
        follow(jobs)
        results = [_arrays(job.result(WHOLE_TYPE)) for job in jobs]
        return (
            {"samples": torch.cat([torch.from_numpy(one["latents"]) for one in results])},
            torch.cat([frames_of(one["frames"]) for one in results]),
        )


def _fields(inputs: dict[str, Any], client: Client, taken: dict[str, Any]) -> dict[str, Any]:
    """What all latents of the batch have in common."""
    fields: dict[str, Any] = {
        "num_inference_steps": inputs["steps"],
        "guidance_scale": inputs["cfg"],
        **_prompts(inputs, taken),
        **_sampler(inputs["sampler_name"], inputs["scheduler"]),
        **image_fields(inputs, taken),
    }
    if inputs.get("loras"):
        fields["lora"] = _loras(inputs["loras"], client)
    if "control_image" in fields:
        fields |= {
            "controlnet_conditioning_scale": inputs.get("control_strength", 1.0),
            "control_guidance_start": inputs.get("control_start", 0.0),
            "control_guidance_end": inputs.get("control_end", 1.0),
        }
    if "ip_adapter_image" in fields:
        fields["ip_adapter_scale"] = inputs.get("ip_strength", 1.0)
    return fields


def _prompts(inputs: dict[str, Any], taken: dict[str, Any]) -> dict[str, Any]:
    """Texts, or what a text encoder of the graph has made of them."""
    given = {name: inputs.get(name) for name in ("positive", "negative")}
    if given["positive"] is None and given["negative"] is None:
        texts = {"prompt": inputs.get("positive_text", "")}
        if negative := inputs.get("negative_text"):
            texts["negative_prompt"] = negative
        return texts
    if given["positive"] is None:
        raise HostError(
            "negative is connected, and positive is not. Connect both, or use the texts.",
            status=400,
        )
    if "prompt_embeds" not in taken:
        raise HostError(
            "this host's model takes no conditioning. Disconnect it and use the texts.", status=400
        )
    encoded = {name: _encoded(name, one) for name, one in given.items() if one is not None}
    length = math.lcm(*(embeds.shape[1] for embeds, _ in encoded.values()))
    fields = {}
    for name, (embeds, pooled) in encoded.items():
        prefix = "negative_" if name == "negative" else ""
        # as ComfyUI does: attention weighs repeated tokens as it does one set of them
        embeds = embeds.repeat(1, length // embeds.shape[1], 1)
        fields[f"{prefix}prompt_embeds"] = _npy(embeds)
        if pooled is not None:
            fields[f"{prefix}pooled_prompt_embeds"] = _npy(pooled)
    return fields


def _encoded(name: str, given: Conditioning) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings and pooled embeddings of a conditioning. HostError for one that is more."""
    if len(given) != 1:
        raise HostError(
            f"{name} holds {len(given)} conditionings, and a host computes one. Leave out the node "
            "that combines them.",
            status=400,
        )
    embeds, facts = given[0]
    if others := [each for each in NOT_SENT if facts.get(each) is not None]:
        raise HostError(
            f"{name} holds {others[0]!r}, which a host does not read. ControlNets are the "
            "sampler's own input; leave out other nodes.",
            status=400,
        )
    return embeds, facts.get("pooled_output")


def _sampler(name: str, schedule: str) -> dict[str, Any]:
    own = {} if name == OWN else {"scheduler": ALIASES.get(name, name)}
    settings = own | SCHEDULES[schedule]
    return {"scheduler": settings} if settings else {}


def _loras(wanted: dict[str, float], client: Client) -> dict[str, float]:
    """LoRAs by the paths that the host takes. HostError for a name that it does not have."""
    found: dict[str, float] = {}
    listed = client.loras()
    paths = {name: one["path"] for one in listed for name in (one["path"], one["name"])}
    for name, weight in wanted.items():
        if name not in paths:
            raise HostError(
                f"the host has no LoRA {name!r}. Allowed: {', '.join(sorted(paths)) or 'none'}.",
                status=400,
            )
        found[paths[name]] = weight
    return found


def _starts(
    given: dict[str, Any], inputs: dict[str, Any], taken: dict[str, Any]
) -> list[dict[str, Any]]:
    """What differs between the latents of a batch: seed, and where to start."""
    samples = given["samples"]
    if samples.ndim != 4 or given.get("noise_mask") is not None:
        what = "a noise mask" if samples.ndim == 4 else f"{samples.ndim} dimensions"
        raise HostError(
            f"latent_image has {what}, and a host takes latents of images without one. For a mask "
            "or a video use Diffusion Sampler.",
            status=400,
        )
    first, last = inputs.get("start_at_step", 0), inputs.get("end_at_step", LAST_STEP)
    height, width = (PIXELS_PER_LATENT * side for side in samples.shape[2:])
    shared: dict[str, Any] = {"height": height, "width": width}
    if first:
        shared["first_step"] = first
    if last < inputs["steps"]:
        shared["stop_step"] = last
    # at denoise 1 nothing of it remains, and an empty latent may have other channels
    is_used = inputs["denoise"] < 1 or first > 0
    if is_used and "latents" not in taken:
        raise HostError("this host's model starts from no latents. Set denoise to 1.", status=400)
    if is_used and not first:
        shared["strength"] = inputs["denoise"]
    numbers = given.get("batch_index") or range(len(samples))
    starts = [{**shared, "seed": (inputs["seed"] + number) % (MAX_SEED + 1)} for number in numbers]
    if is_used:
        for row, start in enumerate(starts):
            start["latents"] = _npy(samples[row : row + 1])
    return starts


def _npy(tensor: torch.Tensor) -> str:
    """Base64 of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, tensor.detach().cpu().float().numpy(), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a result. HostError if the model gives no latents."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        found = {name: file[name] for name in file.files if name != "facts"}
    if "latents" not in found:
        raise HostError("this host's model gives no latents. Use Diffusion Sampler.", status=400)
    return found
