"""What becomes of each field of LocalAI's requests: it is used, it can change no image, or it is
refused with a reason. A field with its default value was not given.
"""

import logging
from collections.abc import Mapping
from typing import Any

from diffusion_client import HostError
from google.protobuf.unknown_fields import UnknownFieldSet

logger = logging.getLogger(__name__)

_LANGUAGE = "it is a setting of language models"
_FROM_CHECKPOINT = "it is read from the checkpoint"
_OPTIONS = "launch arguments of the host are given as options"
_SENT_ALWAYS = "LocalAI sends it for every model, and it says nothing about images"

USED: Mapping[str, frozenset[str]] = {
    "ModelOptions": frozenset(
        "Model ModelFile ModelPath PipelineType SchedulerType CFGScale CLIPSkip F16Memory DType "
        "LowVRAM TensorParallelSize ControlNet LoraAdapter LoraScale LoraAdapters LoraScales "
        "Options".split()
    ),
    "GenerateImageRequest": frozenset(
        "height width step seed positive_prompt negative_prompt dst src CLIPSkip ref_images "
        "ModelIdentity".split()
    ),
    "GenerateVideoRequest": frozenset(
        "prompt negative_prompt start_image width height num_frames fps seed cfg_scale step dst "
        "params ModelIdentity".split()
    ),
}
"""Message -> fields that are used. Their values are validated where they are read."""

HARMLESS: Mapping[str, Mapping[str, str]] = {
    "ModelOptions": {
        **dict.fromkeys(
            ("ContextSize", "NBatch", "Threads", "NGPULayers", "FlashAttention", "MMap"),
            _SENT_ALWAYS,
        ),
        "Seed": "each request has its own seed",
        "CUDA": "the host uses the GPUs that it has",
        "IMG2IMG": "every model that can start from an image does so when it gets one",
        "TrustRemoteCode": "no code of a checkpoint is run",
        "EnforceEager": "only the option compile_unet compiles",
        "DisableLogStatus": "it is about logs",
        "MLock": "it is about main memory",
        "NUMA": "it is about main memory",
    },
    "GenerateImageRequest": {"EnableParameters": "every parameter that the model has is enabled"},
    "GenerateVideoRequest": {},
}
"""Message -> field that can change no image -> why."""

REFUSED: Mapping[str, Mapping[str, str]] = {
    "ModelOptions": {
        **dict.fromkeys(
            (
                "VocabOnly", "RopeFreqBase", "RopeFreqScale", "RMSNormEps", "NGQA", "NoMulMatQ",
                "DraftModel", "MMProj", "RopeScaling", "YarnExtFactor", "YarnAttnFactor",
                "YarnBetaFast", "YarnBetaSlow", "SwapSpace", "MaxModelLen", "NoKVOffload",
                "CacheTypeKey", "CacheTypeValue", "GrammarTriggers", "LimitImagePerPrompt",
                "LimitVideoPerPrompt", "LimitAudioPerPrompt",
            ),
            _LANGUAGE,
        ),
        **dict.fromkeys(
            ("Embeddings", "Reranking", "EnableScore"), "this backend makes images and videos only"
        ),
        **dict.fromkeys(("CLIPModel", "CLIPSubfolder", "Tokenizer", "LoraBase", "LoadFormat"),
                        _FROM_CHECKPOINT),
        **dict.fromkeys(("Overrides", "EngineArgs"), _OPTIONS),
        **dict.fromkeys(
            ("MainGPU", "TensorSplit"), "the environment variable CUDA_VISIBLE_DEVICES chooses GPUs"
        ),
        "Quantization": "the option quantize_to quantizes",
        "GPUMemoryUtilization": "the options shard and enable_model_cpu_offload save GPU memory",
        "Type": "pipeline_type names the model type",
        "AudioPath": "this backend reads no audio",
        "Proxy": "this backend forwards no requests to a provider",
    },
    "GenerateImageRequest": {},
    "GenerateVideoRequest": {
        "end_image": "a video starts from an image, but cannot end at one",
        "audio": "this backend reads no audio",
    },
}  # fmt: skip
"""Message -> refused field -> why."""


def require_available(message: Any) -> None:
    """Refuse a message with a field that cannot be had. Log fields of a newer protocol, which have
    numbers but no names here.
    """
    name = message.DESCRIPTOR.name
    for field, value in message.ListFields():
        if reason := REFUSED[name].get(field.name):
            shown = str(value).strip()
            raise HostError(
                f"{field.name}={shown[:80]} is not available: {reason}. Leave it out.", status=400
            )
    if unknown := sorted({field.field_number for field in UnknownFieldSet(message)}):
        logger.warning(
            "%s has fields that this backend does not know (numbers %s): they change nothing",
            name,
            ", ".join(map(str, unknown)),
        )
