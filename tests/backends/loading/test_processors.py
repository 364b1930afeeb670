"""Processors of texts and images load where torchvision is missing, and components whose classes
have moved.
"""

import importlib
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import transformers

from backends.files.weight_headers import read_folder_header
from backends.loading.key_check import require_encoder
from backends.loading.processors import (
    pipeline_from_folder,
    processors_without_torchvision,
    reachable,
    sized_encoders,
)
from tests.altered import changed
from tests.checkpoints import checkpoint, sample_image
from tests.checkpoints.upstream.tokenizers import qwen_vl
from tests.checkpoints.variants import variant

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


@pytest.mark.parametrize("library", ["deprecated", "stochastic_karras_ve", "diffusers"])
def test_a_component_loads_by_the_name_of_a_pipeline_that_has_moved(tmp_path, library):
    """diffusers itself looks into pipelines.deprecated, which does not have the scheduler."""
    folder = shutil.copytree(variant("KarrasVePipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = [library, "KarrasVeScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = pipeline_from_folder(diffusers.KarrasVePipeline, folder, local_files_only=True)
    assert type(pipe.scheduler) is diffusers.KarrasVeScheduler
    assert not hasattr(diffusers.pipelines.deprecated, "KarrasVeScheduler")


@pytest.mark.parametrize("library", ["diffusers", "wuerstchen"])
def test_a_class_that_diffusers_does_not_export_is_reachable_for_a_while(library):
    def found():
        if library == "diffusers":
            return getattr(diffusers, "PaellaVQModel", None)
        return getattr(getattr(diffusers.pipelines, library, None), "PaellaVQModel", None)

    with reachable({"vqgan": [library, "PaellaVQModel"], "_class_name": "X", "safe": None}):
        assert issubclass(found(), diffusers.ModelMixin)
    assert found() is None


@pytest.mark.parametrize("is_alone", [True, False], ids=["encoder", "encoder_and_decoder"])
def test_an_encoder_of_t5gemma_has_the_size_of_its_configuration(tmp_path, is_alone):
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "dropout_rate": 0.0}
    config = transformers.T5GemmaModuleConfig(**small, **heads, max_position_embeddings=64)
    model = importlib.import_module("diffusers.pipelines.prx").T5GemmaEncoder
    want = model(config)
    folder = tmp_path / "text_encoder"
    want.save_pretrained(folder)
    if not is_alone:
        transformers.T5GemmaConfig(encoder=config, decoder=config).save_pretrained(folder)
    header = read_folder_header(folder, option="--checkpoint")
    require_encoder(model, folder, header, given="--checkpoint", advice="")
    index = {"text_encoder": ["transformers", "T5GemmaEncoder"]}
    got = sized_encoders(tmp_path, index, {"local_files_only": True})["text_encoder"]
    assert torch.equal(got.embed_tokens.weight, want.embed_tokens.weight)


def test_a_folder_may_do_without_the_components_that_it_says(tmp_path):
    """diffusers alone wants to be told again that Stable Diffusion 3 has no T5."""
    without = {name: [None, None] for name in ("text_encoder_3", "tokenizer_3")}
    folder = changed(checkpoint("sd3"), tmp_path / "any", **without)
    kind = diffusers.StableDiffusion3Pipeline
    got = pipeline_from_folder(kind, folder, local_files_only=True)
    assert got.text_encoder_3 is None and got.text_encoder_2 is not None
