"""Textual inversion: the prompt's word is read as the file's vectors, in files of every layout, and
only while the file acts.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.errors import RequestError
from backends.generation.pipeline import LoadedPipeline
from tests.backends.features import TABLE, loaded
from tests.backends.loading.lora_files import SAME, VISIBLE, difference, factors, generate, write

PROMPT = "a photo of Easy-Style, a cat"


@pytest.fixture(scope="module")
def sd1() -> LoadedPipeline:
    return loaded(TABLE["sd1"])


@pytest.fixture(scope="module")
def sdxl() -> LoadedPipeline:
    return loaded(TABLE["sdxl"])


def vectors(encoder: torch.nn.Module, number: int, seed: int = 0) -> Tensor:
    table = encoder.get_input_embeddings().weight
    return (
        3
        * table.std()
        * torch.randn(number, table.shape[1], generator=torch.Generator().manual_seed(seed))
    )


def by_diffusers(pipe: LoadedPipeline, files: dict[str, Tensor]) -> Tensor:
    """What diffusers' own loader draws, with the end of the text where it is: encoder ->
    vectors.
    """
    fresh = loaded(pipe.spec)
    for name, rows in files.items():
        encoder, tokenizer = (
            getattr(fresh.pipe, name),
            getattr(fresh.pipe, name.replace("text_encoder", "tokenizer")),
        )
        fresh.pipe.load_textual_inversion(
            {"easyword": rows}, token="easyword", text_encoder=encoder, tokenizer=tokenizer
        )
        getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
    return generate(fresh, prompt=PROMPT.replace("Easy-Style", "easyword"))


@pytest.mark.parametrize("layout", ["emb_params", "token", "a1111", "bundle"])
def test_every_layout_is_read_as_diffusers_reads_it(
    sd1: LoadedPipeline, tmp_path: Path, layout: str
) -> None:
    rows = vectors(sd1.pipe.text_encoder, 3)
    path = str(tmp_path / "easy-style.safetensors")
    if layout == "a1111":
        path = str(tmp_path / "easy-style.pt")
        torch.save(
            {
                "string_to_token": {"*": 265},
                "string_to_param": {"*": rows},
                "name": "other",
                "step": 100,
            },
            path,
        )
    else:
        key = {
            "emb_params": "emb_params",
            "token": "easy-style",
            "bundle": "bundle_emb.easy-style.string_to_param.*",
        }[layout]
        write(Path(path), {key: rows})
    plain = generate(sd1, prompt=PROMPT, lora={})
    got = generate(sd1, prompt=PROMPT, lora={path: 1.0})
    assert difference(got, by_diffusers(sd1, {"text_encoder": rows})) <= SAME
    assert difference(got, plain) > VISIBLE
    assert torch.equal(generate(sd1, prompt=PROMPT, lora={}), plain)
    assert torch.equal(
        generate(sd1, prompt="a cat", lora={path: 1.0}), generate(sd1, prompt="a cat", lora={})
    )
    assert torch.equal(
        generate(
            sd1, prompt=PROMPT.replace("Easy-Style", "embedding:easy-style"), lora={path: 1.0}
        ),
        got,
    )


def test_both_encoders_of_stable_diffusion_xl_get_their_vectors(
    sdxl: LoadedPipeline, tmp_path: Path
) -> None:
    rows = {
        "text_encoder": vectors(sdxl.pipe.text_encoder, 2),
        "text_encoder_2": vectors(sdxl.pipe.text_encoder_2, 2, 1),
    }
    keys = {"clip_l": rows["text_encoder"], "clip_g": rows["text_encoder_2"]}
    path = write(tmp_path / "easy-style.safetensors", keys)
    assert (
        difference(generate(sdxl, prompt=PROMPT, lora={path: 1.0}), by_diffusers(sdxl, rows))
        <= SAME
    )
    (tmp_path / "half").mkdir()
    half = write(tmp_path / "half" / "easy-style.safetensors", {"clip_l": keys["clip_l"]})
    assert (
        difference(
            generate(sdxl, prompt=PROMPT, lora={half: 1.0}),
            generate(sdxl, prompt=PROMPT, lora={path: 1.0}),
        )
        > VISIBLE
    )


def test_an_embedding_acts_beside_its_lora(sd1: LoadedPipeline, tmp_path: Path) -> None:
    rows = vectors(sd1.pipe.text_encoder, 2)
    name = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_v"
    down, up = factors(0, 16, 16, 4)
    lora = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    (tmp_path / "lora").mkdir()
    alone = write(tmp_path / "lora" / "x.safetensors", lora)
    embedding = write(tmp_path / "easy-style.safetensors", {"emb_params": rows})
    together = write(tmp_path / "x.safetensors", {**lora, "bundle_emb.easy-style.emb_params": rows})
    want = generate(sd1, prompt=PROMPT, lora={alone: 0.5, embedding: 1.0})
    assert difference(generate(sd1, prompt=PROMPT, lora={together: 0.5}), want) <= SAME
    assert difference(generate(sd1, prompt=PROMPT, lora={alone: 0.5}), want) > VISIBLE


def test_an_embedding_is_read_with_compel_too(sd1: LoadedPipeline, tmp_path: Path) -> None:
    path = write(
        tmp_path / "easy-style.safetensors", {"emb_params": vectors(sd1.pipe.text_encoder, 2)}
    )
    pipe = loaded(TABLE["sd1"], compel=True)
    assert (
        difference(
            generate(pipe, prompt=PROMPT, lora={path: 1.0}),
            generate(sd1, prompt=PROMPT, lora={path: 1.0}),
        )
        < VISIBLE
    )
    assert (
        difference(
            generate(pipe, prompt=PROMPT, lora={}), generate(pipe, prompt=PROMPT, lora={path: 1.0})
        )
        > VISIBLE
    )


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "sd1",
            {"emb_params": torch.ones(2, 77)},
            r"vectors of width 77 \(any\), but text_encoder reads 32",
        ),
        ("sd1", {"clip_g": torch.ones(2, 32)}, "clip_g"),
    ],
)
def test_an_embedding_of_another_model_is_refused(
    sd1: LoadedPipeline, tmp_path: Path, name: str, keys: dict, message: str
) -> None:
    path = write(tmp_path / "x.safetensors", keys)
    with pytest.raises(RequestError, match=message):
        generate(sd1, prompt=PROMPT, lora={path: 1.0})


def test_an_embedding_has_no_strength(sd1: LoadedPipeline, tmp_path: Path) -> None:
    path = write(
        tmp_path / "easy-style.safetensors", {"emb_params": vectors(sd1.pipe.text_encoder, 1)}
    )
    with pytest.raises(RequestError, match=r"scale 0\.5.*Give 1"):
        generate(sd1, prompt=PROMPT, lora={path: 0.5})
