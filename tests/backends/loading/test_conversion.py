"""Weights are read as they are stored and converted one tensor at a time: the same values as
diffusers' own conversion, and no more memory than what stays.
"""

import threading
from types import SimpleNamespace

import diffusers
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import nn

from backends.files.weight_headers import Header
from backends.generation.pipeline import load_pipeline
from backends.loading.conversion import convert, stored_dtype
from backends.loading.plain_weights import read_gguf
from backends.loading.quantization import quantize
from backends.loading.weights import vae_dtype
from backends.model_table import ModelSpec
from backends.parallel.weight_shards import release_memory
from backends.quantization_spec import parse_quantization
from backends.request import LoadRequest
from benchmarks.loading import private_bytes
from tests.backends.features import CPU, TABLE
from tests.checkpoints import NAMES, checkpoint, gguf

WIDTH = 2048
LAYER_BYTES = 2 * WIDTH * WIDTH


def as_diffusers_converts(spec: ModelSpec, load: LoadRequest) -> object:
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return getattr(diffusers, spec.pipeline).from_pretrained(
        load.checkpoint,
        dtype={"default": dtypes[load.variant], "vae": vae_dtype(spec, load)},
        local_files_only=True,
    )


@pytest.mark.parametrize(
    "name",
    [
        "sd3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in NAMES
            if name not in ("sd3", "hy", "sdup", "ad")
        ),
    ],
)
def test_converted_weights_are_those_of_diffusers(name: str) -> None:
    spec = TABLE[name]
    for variant in ("fp16", "bf16"):
        load = LoadRequest(model_type=name, checkpoint=str(checkpoint(name)), variant=variant)
        ours, theirs = load_pipeline(spec, load, device=CPU).pipe, as_diffusers_converts(spec, load)
        for part, model in theirs.components.items():
            if not isinstance(model, nn.Module):
                continue
            wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            mine = ours.components[part]
            found = {**dict(mine.named_parameters()), **dict(mine.named_buffers())}
            assert found.keys() == wanted.keys()
            for key, tensor in wanted.items():
                assert found[key].dtype == tensor.dtype, f"{name} {variant} {part} {key}"
                assert torch.equal(found[key], tensor), f"{name} {variant} {part} {key}"
                base = found[key]._base  # torch.compile refuses a view of another dtype
                assert base is None or base.dtype == tensor.dtype, f"{name} {variant} {part} {key}"


def mapped_model(path: str, num_layers: int) -> nn.Module:
    """A model whose weights are pages of a file."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers))
    for name, tensor in load_file(path).items():
        model.get_submodule(name.partition(".")[0]).weight = nn.Parameter(
            tensor, requires_grad=False
        )
    return model


@pytest.mark.parametrize(
    ("kind", "num_layers"), [(None, 12), pytest.param("int8", 40, marks=pytest.mark.slow)]
)
def test_converting_and_packing_take_what_stays_and_few_tensors(tmp_path, kind, num_layers) -> None:
    path = str(tmp_path / "model.safetensors")
    save_file(
        {
            f"{index}.weight": torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)
            for index in range(num_layers)
        },
        path,
    )
    model = mapped_model(path, num_layers)
    pipe = SimpleNamespace(components={"transformer": model}, transformer=model)
    choice = {"denoiser": parse_quantization(kind, option="quantize_to")} if kind else {}
    load = LoadRequest(model_type="sd3", checkpoint="", variant="fp16", quantize=choice)
    release_memory()
    before, peaks, is_done = private_bytes(), [0], threading.Event()

    def sample() -> None:
        while not is_done.wait(0.001):
            peaks[0] = max(peaks[0], private_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    quantize(pipe, TABLE["sd3"], load, device=CPU, divide_block=lambda *_: None)
    convert(model, torch.float16)
    is_done.set()
    sampler.join()
    stays = num_layers * LAYER_BYTES * (1 if kind is None else 0.5)
    assert private_bytes() - before < stays + 2 * LAYER_BYTES
    # packing computes in float32: several copies of one layer, and what is freed every few layers
    assert peaks[0] - before < stays + (2 if kind is None else 16) * LAYER_BYTES


def test_a_file_of_several_dtypes_is_not_read_as_one() -> None:
    shapes = {"a": (1,), "b": (1,), "c": (1,)}
    one = Header(shapes=shapes, dtypes={"a": "F16", "b": "F16", "c": "I64"})
    assert stored_dtype(one) is torch.float16
    assert stored_dtype(Header(shapes=shapes, dtypes={"a": "F16", "b": "F32"})) is None
    assert stored_dtype(Header(shapes=shapes, dtypes={"a": "F8_E4M3"})) is None
    assert stored_dtype(Header(shapes=shapes, dtypes={"a": "BOOL", "b": "BF16"})) is torch.bfloat16
    assert stored_dtype(None) is None


def test_weights_of_a_gguf_file_are_pages_of_it() -> None:
    path = gguf("flux", "Q8_0")
    before = private_bytes()
    weights = read_gguf(str(path))
    reader = GGUFReader(path)
    assert weights.keys() == {entry.name for entry in reader.tensors}
    for entry in reader.tensors:
        assert bytes(weights[entry.name].numpy().tobytes()) == entry.data.tobytes()
    assert private_bytes() - before < 20_000_000
