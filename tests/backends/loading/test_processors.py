"""Processors of texts and images load where torchvision is missing."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import transformers

from backends.loading.processors import pipeline_from_folder, processors_without_torchvision
from tests.checkpoints import checkpoint, sample_image
from tests.checkpoints.upstream.tokenizers import qwen_vl

TEXT = "<|vision_start|><|image_pad|><|vision_end|>a photo of a cat"


@pytest.fixture
def folder(tmp_path):
    made = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    )
    for component in ("processor", "tokenizer"):
        made.save_pretrained(tmp_path / component)
        qwen_vl().save_pretrained(tmp_path / component)
    return tmp_path


@pytest.mark.parametrize("name", ["Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"])
def test_a_processor_with_videos_takes_images_without_torchvision(folder, name):
    index = {"processor": ["transformers", name], "vae": ["diffusers", "AutoencoderKL"]}
    found = processors_without_torchvision(folder, index)
    assert list(found) == ["processor"]
    image = sample_image(64)
    got = found["processor"](text=[TEXT], images=[image], return_tensors="pt")
    alone = transformers.AutoImageProcessor.from_pretrained(folder / "processor")
    want = alone(images=[image], return_tensors="pt")
    assert np.array_equal(got["pixel_values"], want["pixel_values"])
    image_id = qwen_vl().convert_tokens_to_ids("<|image_pad|>")
    assert (got["input_ids"] == image_id).sum() == want["image_grid_thw"].prod() // 4


def test_flux2_dev_starts_with_the_tokenizer_of_its_processor(tmp_path):
    """Its folder names a PixtralProcessor, which transformers lacks without torchvision."""
    folder = tmp_path / "flux2"
    shutil.copytree(checkpoint("flux2"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = pipeline_from_folder(diffusers.Flux2Pipeline, folder, local_files_only=True)
    plain = diffusers.Flux2Pipeline.from_pretrained(checkpoint("flux2"), local_files_only=True)
    got, want = (each.encode_prompt("a photo of a cat")[0] for each in (pipe, plain))
    assert torch.equal(got, want)
