"""The module that the ComfyUI nodes import: alone, nested, and understood by the host's codec in
both directions.
"""

import base64
import importlib.util
import json
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hosts.compat import codec
from tests.hosts.compat.forge import PROTO, Calls, encoded, name, pickled, text

FOLDER = Path(__file__).resolve().parents[2] / "clients" / "multigpu_diffusion"
FUNCTIONS = [
    "convert_b64_to_nhwc_tensor",
    "convert_image_to_hwc_tensor",
    "convert_tensor_to_b64",
    "decode_b64_and_unpickle",
    "pickle_and_encode_b64",
]

# A node pack as ComfyUI loads it: the star import is the last one, and must bring the five names
# and nothing else.
NODE = """
before = set(dir())
from ..multigpu_diffusion.modules.utils import *
brought = sorted(set(dir()) - before - {"before"})
"""
IMPORT_NODE = """
import sys
class Alone:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        assert top not in ("hosts", "backends", "launcher", "torchvision", "diffusers"), name
sys.meta_path.insert(0, Alone())
sys.path.insert(0, sys.argv[1])
from node_pack.nodes import node
assert node.brought == {functions}, node.brought
import torch
image = torch.rand(3, 2, 3)
again = node.convert_b64_to_nhwc_tensor(node.convert_tensor_to_b64(image))
assert again.shape == (1, 3, 2, 3) and (again[0] - image).abs().max() <= 0.5 / 255 + 1e-6
"""


@pytest.fixture(scope="module")
def utils():
    spec = importlib.util.spec_from_file_location(
        "dropped_in_utils", FOLDER / "modules" / "utils.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_as_a_nested_package_without_our_package_on_the_path(tmp_path):
    (tmp_path / "node_pack" / "nodes").mkdir(parents=True)
    for package in ("node_pack", "node_pack/nodes"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "node_pack" / "nodes" / "node.py").write_text(NODE)
    (tmp_path / "node_pack" / "multigpu_diffusion").symlink_to(FOLDER)
    script = IMPORT_NODE.replace("{functions}", repr(FUNCTIONS))
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_all_names_exactly_the_five_functions(utils):
    assert sorted(utils.__all__) == FUNCTIONS


@pytest.mark.parametrize("function", FUNCTIONS)
def test_none_stays_none(utils, function):
    assert getattr(utils, function)(None) is None


def sample_image(channels: int) -> torch.Tensor:
    """Every value from 0 to 255 once, as ComfyUI holds it."""
    shades = torch.arange(256, dtype=torch.float32).reshape(16, 16, 1) / 255
    return shades.repeat(1, 1, channels)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_image_survives_the_way_there_and_back_bit_for_bit(utils, channels, mode):
    sent = utils.convert_tensor_to_b64(sample_image(channels))
    assert utils.decode_b64_and_unpickle(sent).mode == mode
    back = utils.convert_b64_to_nhwc_tensor(sent)
    assert (back.dtype, back.is_contiguous()) == (torch.float32, True)
    assert torch.equal(back, sample_image(channels)[None])


def test_image_with_a_batch_of_one_is_taken(utils):
    assert utils.convert_tensor_to_b64(sample_image(3)[None]) == utils.convert_tensor_to_b64(
        sample_image(3)
    )


def test_values_outside_zero_to_one_are_clipped(utils):
    back = utils.convert_b64_to_nhwc_tensor(
        utils.convert_tensor_to_b64(torch.tensor([[[-1.0], [2.0]]]))
    )
    assert back.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (4, 4), (4, 4, 2)])
def test_image_of_another_shape_is_refused(utils, shape):
    with pytest.raises(
        ValueError, match=r"Give \[height, width, channels\] with 1, 3 or 4 channels"
    ):
        utils.convert_tensor_to_b64(torch.zeros(shape))


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3), ("1", 3), ("CMYK", 3)]
)
def test_image_of_any_mode_becomes_a_tensor(utils, mode, channels):
    tensor = utils.convert_image_to_hwc_tensor(
        Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    )
    assert (tensor.shape, tensor.dtype) == ((2, 3, channels), torch.float32)
    assert torch.equal(tensor, torch.ones(2, 3, channels))


def test_text_is_ascii_base64_of_protocol_4(utils):
    sent = utils.pickle_and_encode_b64([1, "\u00e9"])
    assert sent.isascii()
    assert "\n" not in sent
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(base64.b64decode(sent))) <= 4


def test_plain_unpickling_reads_what_we_encode(utils):
    """An old checkout on the other side knows nothing but pickle.loads."""
    value = pickle.loads(
        base64.b64decode(utils.pickle_and_encode_b64([torch.arange(3.0), {"a": None}]))
    )
    assert torch.equal(value[0], torch.arange(3.0))


def test_host_reads_the_images_that_nodes_send(utils):
    for channels in (1, 3, 4):
        decoded = codec.decode_image(
            utils.convert_tensor_to_b64(sample_image(channels)), field="image"
        )
        np.testing.assert_array_equal(
            np.asarray(decoded), (sample_image(3) * 255).round().byte().numpy()
        )


def test_host_reads_the_tensors_and_conditionings_that_nodes_send(utils):
    latent = torch.randn(1, 4, 8, 8)
    np.testing.assert_array_equal(
        codec.decode_tensor(utils.pickle_and_encode_b64(latent), field="latent"), latent.numpy()
    )
    pair = [torch.randn(1, 7, 6), {"pooled_output": torch.randn(1, 5), "area": (1, 2)}]
    conditioning = codec.decode_conditioning(
        utils.pickle_and_encode_b64([pair]), field="positive_embeds"
    )
    np.testing.assert_array_equal(conditioning.embeds, pair[0].numpy())
    np.testing.assert_array_equal(conditioning.pooled, pair[1]["pooled_output"].numpy())


def test_nodes_read_the_images_frames_and_latents_that_the_host_sends(utils):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    received = utils.convert_b64_to_nhwc_tensor(codec.encode_image(image))
    assert torch.equal(received, torch.from_numpy(np.array(image))[None].float() / 255)
    frames = utils.decode_b64_and_unpickle(codec.encode_frames([image, image.rotate(180)]))
    assert [frame.tobytes() for frame in frames] == [image.tobytes(), image.rotate(180).tobytes()]
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    received = utils.decode_b64_and_unpickle(codec.encode_latents(latents))
    assert (received.device.type, received.dtype) == ("cpu", torch.float32)
    np.testing.assert_array_equal(received.numpy(), latents)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_nodes_read_tensors_of_every_protocol(utils, protocol, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert torch.equal(utils.decode_b64_and_unpickle(pickled(tensor, protocol)), tensor)
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    assert type(utils.decode_b64_and_unpickle(pickled(parameter, protocol))) is torch.nn.Parameter


def test_image_that_was_opened_from_a_file_comes_back_as_a_plain_one(utils, tmp_path):
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        back = utils.decode_b64_and_unpickle(utils.pickle_and_encode_b64(opened))
    assert type(back) is Image.Image
    assert back.getpixel((0, 0)) == (1, 2, 3)


def test_code_in_a_received_pickle_is_not_run(utils, tmp_path):
    target = tmp_path / "pwned"
    for value in (
        Calls(os.system, f"touch {target}"),
        [Calls(open, str(target), "w")],
        Calls(eval, "1/0"),
    ):
        with pytest.raises(
            pickle.UnpicklingError, match="only images, tensors and plain values are allowed"
        ):
            utils.decode_b64_and_unpickle(pickled(value))
    assert not target.exists()


def test_code_in_a_received_storage_is_not_run(utils, tmp_path):
    target = tmp_path / "pwned"
    inner = pickle.dumps(Calls(os.system, f"touch {target}"), 2)
    with pytest.raises(pickle.UnpicklingError):
        utils.decode_b64_and_unpickle(pickled(Calls(torch.storage._load_from_bytes, inner)))
    assert not target.exists()


def test_received_pickle_cannot_encode_text_otherwise(utils):
    data = PROTO + name("_codecs", "encode") + text("a") + text("rot13") + b"\x86R."
    with pytest.raises(pickle.UnpicklingError, match="only latin1 is allowed"):
        utils.decode_b64_and_unpickle(encoded(data))


def test_received_pickle_cannot_change_a_function(utils):
    data = (
        PROTO + name("torch._utils", "_rebuild_tensor_v2") + b"}" + text("__defaults__") + b"Nsb."
    )
    with pytest.raises(pickle.UnpicklingError, match="changes a function"):
        utils.decode_b64_and_unpickle(encoded(data))


def test_config_names_the_default_ports():
    assert json.loads((FOLDER / "config.json").read_text()) == {
        "global": {"port": 6000, "master_port": 29400}
    }
