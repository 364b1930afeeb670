"""LoRA, LoCon, LoHa, LoKr, DoRA and full differences: each equal to weights merged by hand, and
gone without a trace afterwards.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.generation.pipeline import LoadedPipeline
from backends.quantization_spec import parse_quantization
from tests.backends.features import TABLE, loaded
from tests.backends.loading.lora_files import (
    SAME,
    VISIBLE,
    Keys,
    difference,
    factors,
    generate,
    layer_of,
    require_same,
    write,
)
from tests.checkpoints import lora

LINEAR = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_v"
CROSS = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"
CONV = "unet.up_blocks.1.resnets.1.conv1"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sd1() -> LoadedPipeline:
    return loaded(TABLE["sd1"])


@pytest.fixture(scope="module")
def flux() -> LoadedPipeline:
    return loaded(TABLE["flux"])


def kohya(name: str) -> str:
    component, _, layer = name.partition(".")
    return (
        f"{'lora_unet' if component == 'unet' else 'lora_te_text_model'}_{layer.replace('.', '_')}"
    )


def pair(pipe: LoadedPipeline, name: str, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    weight = layer_of(pipe, name).weight
    return factors(seed, weight.shape[0], weight[0].numel(), rank)


def as_conv(pipe: LoadedPipeline, name: str, down: Tensor) -> Tensor:
    return down.view(down.shape[0], *layer_of(pipe, name).weight.shape[1:])


def test_each_layers_alpha_is_its_own(sd1: LoadedPipeline, tmp_path: Path) -> None:
    keys: Keys = {}
    changes = {}
    for rank, alpha, name in ((2, 2.0, LINEAR), (4, 16.0, CROSS), (8, 1.0, TEXT)):
        down, up = pair(sd1, name, rank, seed=rank)
        keys |= {
            f"{kohya(name)}.lora_down.weight": down,
            f"{kohya(name)}.lora_up.weight": up,
            f"{kohya(name)}.alpha": torch.tensor(alpha),
        }
        changes[name] = alpha / rank * up @ down
    require_same(sd1, write(tmp_path / "x.safetensors", keys), changes)


def locon(pipe: LoadedPipeline) -> tuple[Keys, Tensor]:
    down, up = pair(pipe, CONV, 4)
    return {
        "lora_down.weight": as_conv(pipe, CONV, down),
        "lora_up.weight": up[:, :, None, None],
        "alpha": torch.tensor(2.0),
    }, up @ down / 2


def locon_with_middle(pipe: LoadedPipeline) -> tuple[Keys, Tensor]:
    out, num_in = layer_of(pipe, CONV).weight.shape[:2]
    down, up = factors(0, out, num_in, 3)
    middle = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    keys = {
        "lora_down.weight": down[..., None, None],
        "lora_up.weight": up[..., None, None],
        "lora_mid.weight": middle,
    }
    return {**keys, "alpha": torch.tensor(3.0)}, torch.einsum("or,rskl,si->oikl", up, middle, down)


def loha(pipe: LoadedPipeline, name: str = LINEAR, rank: int = 2) -> tuple[Keys, Tensor]:
    (b1, a1), (b2, a2) = pair(pipe, name, rank, 1), pair(pipe, name, rank, 2)
    a2 = a2 * 24
    keys = {
        "hada_w1_a": a1,
        "hada_w1_b": b1,
        "hada_w2_a": a2,
        "hada_w2_b": b2,
        "alpha": torch.tensor(1.0),
    }
    return keys, (a1 @ b1) * (a2 @ b2) / rank


def loha_of_a_kernel(pipe: LoadedPipeline) -> tuple[Keys, Tensor]:
    return loha(pipe, CONV, 8)


def loha_of_cores(pipe: LoadedPipeline) -> tuple[Keys, Tensor]:
    out, num_in = layer_of(pipe, CONV).weight.shape[:2]
    generator = torch.Generator().manual_seed(0)
    t1, t2 = (torch.randn(2, 2, 3, 3, generator=generator) for _ in "12")
    (b1, a1), (b2, a2) = (factors(seed, out, num_in, 2) for seed in (1, 2))
    one, other = (
        torch.einsum("ijkl,jr,ip->prkl", t, b, a.T) for t, a, b in ((t1, a1, b1), (t2, a2, b2))
    )
    keys = {
        "hada_t1": t1,
        "hada_w1_a": a1.T,
        "hada_w1_b": b1,
        "hada_t2": t2,
        "hada_w2_a": a2.T,
        "hada_w2_b": b2,
    }
    return {**keys, "alpha": torch.tensor(8.0)}, 4 * one * other


def lokr(pipe: LoadedPipeline, name: str = LINEAR) -> tuple[Keys, Tensor]:
    """Both factors whole: alpha then means nothing."""
    out, num_in = layer_of(pipe, name).weight.flatten(1).shape
    w2, w1 = (
        factors(0, out // 4, num_in // 2, 4),
        3 * torch.tensor([[1.0, -0.5], [0.3, 0.2], [0.1, 0.4], [-0.2, 0.7]]),
    )
    return {"lokr_w1": w1, "lokr_w2": w2[1] @ w2[0], "alpha": torch.tensor(1e9)}, torch.kron(
        w1, w2[1] @ w2[0]
    )


def lokr_of_factors(pipe: LoadedPipeline) -> tuple[Keys, Tensor]:
    out, num_in = layer_of(pipe, LINEAR).weight.shape
    b1, a1 = factors(0, 4, 2, 2)
    b2, a2 = factors(1, out // 4, num_in // 2, 2)
    keys = {
        "lokr_w1_a": a1,
        "lokr_w1_b": b1,
        "lokr_w2_a": a2,
        "lokr_w2_b": b2,
        "alpha": torch.tensor(8.0),
    }
    return keys, 4 * torch.kron(a1 @ b1, a2 @ b2)


def lokr_of_a_kernel(pipe: LoadedPipeline) -> tuple[Keys, Tensor]:
    out, num_in = layer_of(pipe, CONV).weight.shape[:2]
    w1 = torch.tensor([[1.0, -0.5], [0.3, 0.2]])
    w2 = 0.1 * torch.randn(out // 2, num_in // 2, 3, 3, generator=torch.Generator().manual_seed(0))
    return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1[..., None, None], w2)


def full_difference(pipe: LoadedPipeline) -> tuple[Keys, Tensor]:
    change = 0.1 * torch.randn(
        layer_of(pipe, CONV).weight.shape, generator=torch.Generator().manual_seed(0)
    )
    return {"diff": change}, change


FORMATS = [
    (CONV, locon),
    (CONV, locon_with_middle),
    (LINEAR, loha),
    (CONV, loha_of_a_kernel),
    (CONV, loha_of_cores),
    (LINEAR, lokr),
    (LINEAR, lokr_of_factors),
    (CONV, lokr_of_a_kernel),
    (CONV, full_difference),
]


@pytest.mark.parametrize(
    ("name", "make"), FORMATS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_format_equals_weights_merged_by_hand(
    sd1: LoadedPipeline, tmp_path: Path, name: str, make
) -> None:
    keys, change = make(sd1)
    path = write(
        tmp_path / "x.safetensors", {f"{kohya(name)}.{key}": tensor for key, tensor in keys.items()}
    )
    require_same(sd1, path, {name: change})
    require_same(sd1, path, {name: change}, scale=-0.5)


def test_biases_and_norms_change_too(sd1: LoadedPipeline, tmp_path: Path) -> None:
    norm = "unet.up_blocks.1.resnets.0.norm1"
    bias, weight = (
        torch.linspace(-2, 3, layer_of(sd1, name).weight.shape[0]) for name in (CONV, norm)
    )
    keys = {
        f"{kohya(CONV)}.diff_b": bias,
        f"{kohya(norm)}.w_norm": weight,
        f"{kohya(norm)}.b_norm": weight.clone(),
    }
    changes = {f"{CONV}:bias": bias, f"{norm}:weight": weight, f"{norm}:bias": weight}
    require_same(sd1, write(tmp_path / "x.safetensors", keys), changes)


def dora_change(weight: Tensor, change: Tensor, magnitude: Tensor, *, by_column: bool) -> Tensor:
    """m * (W + dW) / |W + dW| - W."""
    merged = (weight + change.view_as(weight)).detach()
    lines = merged.transpose(0, 1) if by_column else merged
    lines = (
        magnitude.view(-1, *[1] * (weight.dim() - 1))
        * lines
        / lines.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
    )
    return (lines.transpose(0, 1) if by_column else lines) - weight.detach()


@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("make", [locon, loha, lokr], ids=lambda make: make.__name__)
def test_dora_scales_of_rows_and_columns_are_computed(
    sd1: LoadedPipeline, tmp_path: Path, make, by_column: bool
) -> None:
    """At another strength than 1 the whole change is scaled, as A1111 and ComfyUI do."""
    name = CONV if make is locon else CROSS
    keys, change = make(sd1) if make is locon else make(sd1, name)
    weight = layer_of(sd1, name).weight
    num_lines = weight.shape[1 if by_column else 0]
    magnitude = torch.linspace(0.5, 3, num_lines)
    ones = [1] * (weight.dim() - 2)
    shaped = magnitude.view(1, -1, *ones) if by_column else magnitude.view(-1, 1, *ones)
    path = write(
        tmp_path / "x.safetensors",
        {f"{kohya(name)}.{key}": tensor for key, tensor in {**keys, "dora_scale": shaped}.items()},
    )
    want = dora_change(weight, change, magnitude, by_column=by_column)
    require_same(sd1, path, {name: want})
    require_same(sd1, path, {name: want}, scale=0.5)


@pytest.mark.parametrize("name", [LINEAR, CONV, TEXT])
def test_pefts_magnitudes_are_computed_with_the_scale_inside(
    sd1: LoadedPipeline, tmp_path: Path, name: str
) -> None:
    down, up = pair(sd1, name, 4)
    weight = layer_of(sd1, name).weight
    magnitude = torch.linspace(0.5, 3, weight.shape[0])
    shaped = magnitude if weight.dim() == 2 else magnitude.view(1, -1, 1, 1)
    down, up = (as_conv(sd1, name, down), up[..., None, None]) if weight.dim() == 4 else (down, up)
    keys = {
        f"{name}.lora_A.weight": down,
        f"{name}.lora_B.weight": up,
        f"{name}.lora_magnitude_vector": shaped,
    }
    path = write(tmp_path / "x.safetensors", keys)
    for scale in (1.0, 0.5):
        want = dora_change(
            weight, scale * up.flatten(1) @ down.flatten(1), magnitude, by_column=False
        )
        require_same(sd1, path, {name: want / scale}, scale=scale)


def test_doras_and_loras_act_together_in_any_order(sd1: LoadedPipeline, tmp_path: Path) -> None:
    weight = layer_of(sd1, LINEAR).weight
    paths, changes = [], []
    for number, magnitude in enumerate(
        (None, torch.linspace(0.5, 3, weight.shape[0]), torch.linspace(2, 1, weight.shape[0]))
    ):
        down, up = pair(sd1, LINEAR, 4, seed=number)
        keys = {f"{LINEAR}.lora_A.weight": down, f"{LINEAR}.lora_B.weight": up}
        change = up @ down
        if magnitude is not None:
            keys[f"{LINEAR}.dora_scale"] = magnitude[:, None]
            change = dora_change(weight, change, magnitude, by_column=False)
        paths.append(write(tmp_path / f"{number}.safetensors", keys))
        changes.append(change)
    both = generate(sd1, lora=dict.fromkeys(paths, 0.7))
    assert difference(generate(sd1, lora=dict.fromkeys(reversed(paths), 0.7)), both) <= SAME
    for path in paths:
        generate(sd1, lora={path: 0.7})
    layer_of(sd1, LINEAR).weight.data += 0.7 * sum(changes)
    try:
        assert difference(generate(sd1, lora={}), both) <= SAME
    finally:
        layer_of(sd1, LINEAR).weight.data -= 0.7 * sum(changes)


def metadata(component: str, **values: object) -> dict[str, str]:
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(
            {f"{component}.{name}": value for name, value in values.items()}
        ),
    }


HEADERS = [
    ({"r": 4, "lora_alpha": 16}, 4.0),
    ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8.0),
    ({"r": 16, "lora_alpha": 16, "rank_pattern": {"attn.to_q": 4}}, 4.0),
    ({"r": 4, "lora_alpha": 1, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 8}}, 2.0),
]


@pytest.mark.parametrize(("header", "scale"), HEADERS)
def test_the_headers_alpha_acts(
    flux: LoadedPipeline, tmp_path: Path, header: dict[str, object], scale: float
) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    down, up = pair(flux, name, 4)
    keys = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    require_same(
        flux,
        write(tmp_path / "x.safetensors", keys, metadata("transformer", **header)),
        {name: scale * up @ down},
    )


@pytest.mark.parametrize("name", ["sdxl", "pixa", "wan_t2v"])
def test_the_headers_alpha_acts_for_every_kind_of_type(tmp_path: Path, name: str) -> None:
    pipe = loaded(TABLE[name])
    component = TABLE[name].denoiser
    layer = next(
        name for name, _ in getattr(pipe.pipe, component).named_modules() if name.endswith("to_v")
    )
    down, up = pair(pipe, f"{component}.{layer}", 4)
    keys = {f"{component}.{layer}.lora_A.weight": down, f"{component}.{layer}.lora_B.weight": up}
    path = write(tmp_path / "x.safetensors", keys, metadata(component, r=4, lora_alpha=16))
    require_same(pipe, path, {f"{component}.{layer}": 4 * up @ down})


def test_pefts_own_folder_has_its_alpha_beside_it(flux: LoadedPipeline, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q"
    down, up = pair(flux, f"transformer.{name}", 4)
    keys = {
        f"base_model.model.{name}.lora_A.weight": down,
        f"base_model.model.{name}.lora_B.weight": up,
    }
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"})
    )
    require_same(
        flux,
        write(tmp_path / "adapter_model.safetensors", keys),
        {f"transformer.{name}": 2 * up @ down},
    )


@pytest.mark.parametrize("kind", ["int8", "bnb,int8"])
def test_dora_and_lokr_act_on_packed_weights(tmp_path: Path, kind: str) -> None:
    """Equal to merging into what the packed weights unpack to is out of reach for the merged layer
    itself; equal to no change is not.
    """
    pipe = loaded(
        TABLE["sd1"], quantize={"denoiser": parse_quantization(kind, option="quantize_to")}
    )
    plain = generate(pipe)
    for make in (lokr, loha):
        keys, _ = make(pipe)
        magnitude = torch.linspace(0.5, 3, layer_of(pipe, LINEAR).out_features)[:, None]
        for extra in ({}, {"dora_scale": magnitude}):
            path = tmp_path / f"{make.__name__}{len(extra)}.safetensors"
            written = write(
                path,
                {f"{kohya(LINEAR)}.{key}": tensor for key, tensor in {**keys, **extra}.items()},
            )
            assert difference(generate(pipe, lora={written: 1.0}), plain) > VISIBLE
            assert difference(generate(pipe, lora={}), plain) == 0


@pytest.mark.parametrize(
    "make", [locon, loha, lokr, full_difference], ids=lambda make: make.__name__
)
def test_formats_are_fused_into_plain_layers(sd1: LoadedPipeline, tmp_path: Path, make) -> None:
    name = CONV if make in (locon, full_difference) else LINEAR
    keys, _ = make(sd1)
    weight = layer_of(sd1, name).weight
    magnitude = torch.linspace(0.5, 3, weight.shape[0]).view(-1, *[1] * (weight.dim() - 1))
    path = write(
        tmp_path / "x.safetensors",
        {
            f"{kohya(name)}.{key}": tensor
            for key, tensor in {**keys, "dora_scale": magnitude}.items()
        },
    )
    pipe = loaded(TABLE["sd1"], lora={path: 0.6, str(lora("sd1", style="kohya")): 0.3})
    want = generate(pipe)
    pipe.loras.fuse()
    assert not [
        name for name, _ in pipe.pipe.unet.named_modules() if "lora" in name or "base_layer" in name
    ]
    assert difference(generate(pipe), want) <= SAME
