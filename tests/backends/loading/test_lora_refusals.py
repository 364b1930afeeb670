"""What has no layer in the model is refused by its name, and the error says what the file is."""

import logging
from pathlib import Path

import pytest
import torch

from backends.errors import ConfigError
from tests.backends.loading.lora_files import Keys, write

DOWN, UP = torch.ones(2, 32), torch.ones(32, 2)
WHOLE = {
    "transformer.layers.0.attention.to_q.lora_A.weight": DOWN,
    "transformer.layers.0.attention.to_q.lora_B.weight": UP,
}
REFUSALS = [
    (
        "half a pair",
        {"transformer.layers.0.attention.to_k.lora_A.weight": DOWN},
        r"1 of 2 layers lack a part \(the first: \S+to_k has down, but no up\)",
    ),
    (
        "an alpha alone",
        {"transformer.layers.0.attention.to_k.alpha": torch.tensor(1.0)},
        r"1 of 2 layers lack a part",
    ),
    (
        "LoKr without a layer",
        {f"diffusion_model.layers.77.attention.to_q.lokr_w{n}": DOWN for n in "12"},
        r"2 of 4 keys are for layers .*first: \S+layers\.77\S+; it holds LoKr",
    ),
    (
        "half of LoHa",
        {"transformer.layers.0.attention.to_k.hada_w1_a": DOWN},
        "no hada_w1_b and no hada_w2_a",
    ),
    (
        "OFT",
        {"transformer.layers.0.attention.to_k.oft_blocks": DOWN},
        r"1 keys that are not a LoRA's .*oft_blocks\); it holds OFT",
    ),
    (
        "a value that is no number",
        {
            "transformer.layers.0.attention.to_k.lora_A.weight": DOWN / 0,
            "transformer.layers.0.attention.to_k.lora_B.weight": UP,
        },
        r"weights that are not finite \(\S+to_k\.lora_A\.weight\)",
    ),
    (
        "an embedding that is no number",
        {"emb_params": torch.full((2, 32), float("nan"))},
        r"weights that are not finite \(x\.any\)",
    ),
    (
        "an unknown key",
        {"transformer.layers.0.attention.to_k.scalar": DOWN},
        r"1 keys that are not a LoRA's \(the first: \S+scalar\)",
    ),
    (
        "another size",
        {
            "transformer.layers.0.attention.to_k.lora_A.weight": torch.ones(2, 48),
            "transformer.layers.0.attention.to_k.lora_B.weight": UP,
        },
        r"2 of 4 keys .*another size .*to_k\S+: 32x48, in the model 32x32\)",
    ),
    (
        "the same layer twice",
        {
            "lora_unet_layers_0_attention_to_q.lora_down.weight": DOWN,
            "lora_unet_layers_0_attention_to_q.lora_up.weight": UP,
        },
        "twice, under different names",
    ),
    (
        "a bias that is not there",
        {"transformer.layers.0.attention.to_q.diff_b": torch.ones(32)},
        "3 of 3 keys",
    ),
]


@pytest.mark.parametrize(
    ("what", "keys", "message"), REFUSALS, ids=[what for what, _, _ in REFUSALS]
)
def test_what_does_not_fit_is_refused_by_its_name(
    pipes, tmp_path: Path, what: str, keys: Keys, message: str
) -> None:
    path = write(
        tmp_path / "x.safetensors",
        {key: tensor.clone() for key, tensor in {**WHOLE, **keys}.items()},
    )
    with pytest.raises(ConfigError, match=message) as caught:
        pipes("zimage").loras.use({path: 1.0})
    assert len(str(caught.value)) < 600
    pipes("zimage").loras.use({})


@pytest.mark.parametrize(
    ("keys", "header", "message"),
    [
        (
            {"model.diffusion_model.input_blocks.0.0.weight": DOWN},
            None,
            "holds no LoRA weights; it holds a checkpoint.*--checkpoint",
        ),
        (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": DOWN,
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": UP,
            },
            None,
            "made for FLUX",
        ),
        (
            {"a.lora_A.weight": DOWN, "a.lora_B.weight": UP},
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
            "made for stable-diffusion-xl",
        ),
    ],
)
def test_a_refusal_says_what_the_file_is(
    pipes, tmp_path: Path, keys: Keys, header: dict[str, str] | None, message: str
) -> None:
    path = write(
        tmp_path / "x.safetensors", {key: tensor.clone() for key, tensor in keys.items()}, header
    )
    with pytest.raises(ConfigError, match=message):
        pipes("zimage").loras.use({path: 1.0})


def test_a_lora_that_names_another_model_is_told_once(pipes, tmp_path: Path, caplog) -> None:
    header = {"modelspec.architecture": "flux-1-dev/lora"}
    path = write(tmp_path / "x.safetensors", WHOLE, header)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pipes("zimage").loras.use({path: 1.0})
    told = [each.getMessage() for each in caplog.records if "another model" in each.getMessage()]
    assert told == [
        f"LoRA {path} says that it was trained on another model (modelspec.architecture "
        "'flux-1-dev/lora') than Z-Image"
    ]
    pipes("zimage").loras.use({})
