"""Downloads with huggingface_hub's own client from a hub on this machine: what comes, what goes
wrong, and what is said of it.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from backends.errors import ConfigError
from backends.hub import client
from backends.hub.cache import Found, Wanted
from backends.hub.client import download, locate, size_text
from backends.hub.names import parse_name
from tests.altered import WEIGHTS
from tests.checkpoints import checkpoint, lora


def wanted(text: str = "acme/tiny", kind: str = "pipeline", option: str = "checkpoint") -> Wanted:
    return Wanted(option=option, name=parse_name(text), kind=kind)


def fetched(one: Wanted) -> Found:
    """Locate and download, as a host does."""
    found = locate(one, offline=False)
    download([(found, found.missing(variant="fp32", denoiser="unet"))], lambda done, total: None)
    return locate(one, offline=True)


def refusal(one: Wanted, *, offline: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        found = locate(one, offline=offline)
        missing = found.missing(variant="fp32", denoiser="unet")
        download([(found, missing)], lambda done, total: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_outline_comes_first_and_then_the_same_files_whole(hub):
    source = checkpoint("sdxl")
    hub.add("acme/tiny", source)
    outline = locate(wanted(), offline=False)
    weights = outline.path / "unet" / WEIGHTS
    assert weights.stat().st_size == (source / "unet" / WEIGHTS).stat().st_size
    assert weights.stat().st_blocks * 512 < weights.stat().st_size
    assert not hub.downloads(".safetensors")
    told: list[tuple[int, int]] = []
    missing = outline.missing(variant="fp32", denoiser="unet")
    download([(outline, missing)], lambda done, total: told.append((done, total)))
    assert told[-1] == (sum(missing.values()),) * 2
    found = locate(wanted(), offline=True)
    for path in source.rglob("*"):
        if path.is_file():
            assert (found.path / path.relative_to(source)).read_bytes() == path.read_bytes()
    asked = len(hub.requests)
    assert locate(wanted(), offline=False).path == found.path
    assert len(hub.requests) == asked, "what is in the cache is used without the network"


def test_nothing_is_downloaded_that_is_not_loaded(hub, tmp_path):
    source = checkpoint("sdxl")
    files = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
    one = source / "unet" / WEIGHTS
    more = ("unet/model.onnx", "unet/code.py", "unet/diffusion_pytorch_model.bin", "whole.ckpt")
    fp16 = {f"{name.removesuffix('safetensors')}fp16.safetensors": one for name in files}
    fp16 = {name: path for name, path in fp16.items() if "diffusion_pytorch_model" in name}
    hub.add("acme/tiny", {**files, **fp16, **dict.fromkeys(more, one)})
    found = locate(wanted(), offline=False)
    assert not any("fp16" in name for name in found.missing(variant="fp32", denoiser="unet"))
    assert {name for name in found.missing(variant="fp16", denoiser="unet") if "unet" in name} == {
        "unet/diffusion_pytorch_model.fp16.safetensors"
    }
    got = fetched(wanted())
    assert sorted(path.name for path in (got.path / "unet").iterdir()) == ["config.json", WEIGHTS]
    assert not (got.path / "whole.ckpt").exists()


def test_files_that_another_program_has_downloaded_are_used_offline(hub):
    """By the command that the messages name."""
    hub.add("acme/tiny", checkpoint("sdxl"))
    assert "Run `hf download acme/tiny` while online" in refusal(wanted(), offline=True)
    command = [Path(sys.executable).with_name("hf"), "download", "acme/tiny"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    asked = len(hub.requests)
    found = locate(wanted(), offline=True)
    assert (found.path / "model_index.json").is_file() and found.listing == {}
    assert len(hub.requests) == asked


def test_a_revision_is_a_branch_or_a_commit(hub):
    repository = hub.add("acme/tiny", checkpoint("sdxl"))
    repository.branches["fp16"] = "f" * 40
    assert locate(wanted("acme/tiny@fp16"), offline=False).commit == "f" * 40
    assert locate(wanted(f"acme/tiny@{'f' * 40}"), offline=False).commit == "f" * 40
    message = refusal(wanted("acme/tiny@nowhere"))
    assert "acme/tiny has no revision 'nowhere'" in message and "leave @nowhere out" in message


def test_one_file_of_a_repository(hub):
    hub.add("acme/styles", {"a/one.safetensors": lora("sdxl"), "b.safetensors": lora("sdxl")})
    found = fetched(wanted("acme/styles/a/one.safetensors", "file", "lora"))
    assert found.path.read_bytes() == Path(lora("sdxl")).read_bytes()
    assert hub.downloads(".safetensors") == ["a/one.safetensors"]
    message = refusal(wanted("acme/styles", "file", "lora"))
    assert message == (
        "--lora=acme/styles holds 2 files of weights. Add one of them: a/one.safetensors, "
        "b.safetensors."
    )
    message = refusal(wanted("acme/styles/c.safetensors", "file", "lora"))
    assert "acme/styles holds: a/one.safetensors, b.safetensors" in message


def test_gated_and_private_models_need_a_token(hub, monkeypatch):
    hub.add("acme/gated", checkpoint("sdxl"), gated=True)
    hub.add("acme/private", checkpoint("sdxl"), private=True)
    message = refusal(wanted("acme/gated"))
    assert message.startswith(f"--checkpoint=acme/gated is gated on {hub.url}. Accept its terms")
    assert f"{hub.url}/acme/gated" in message and "HF_TOKEN" in message
    for name in ("acme/private", "acme/missing"):
        message = refusal(wanted(name))
        assert f"--checkpoint={name} is neither a path on this machine nor a model on" in message
        assert "for a private model set HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", hub.token)
    for name in ("acme/gated", "acme/private"):
        assert fetched(wanted(name)).listing == {}
    elsewhere = [one for one in hub.requests if one.path.startswith("cdn/")]
    assert elsewhere and not any(one.token for one in elsewhere), "the token stays with the hub"


@pytest.fixture
def large(hub, tmp_path) -> Path:
    """A file that comes in several pieces: the client keeps what it has in steps of 10 MB."""
    file = tmp_path / "large.safetensors"
    save_file({"weight": torch.arange(6_000_000, dtype=torch.float32)}, file)
    hub.add("acme/large", {"large.safetensors": file})
    return file


LARGE = wanted("acme/large/large.safetensors", "file", "lora")


def asked_for(hub) -> list[str | None]:
    """The ranges of the large file that were asked for, without its header."""
    ranges = [one.range for one in hub.requests if one.file == "large.safetensors"]
    return [one for one in ranges if one is None or not one.startswith("bytes=0-")]


def test_a_connection_that_breaks_is_continued_where_it_broke(hub, large):
    hub.break_after[large.name] = [11_000_000, 12_000_000]
    assert fetched(LARGE).path.read_bytes() == large.read_bytes()
    assert asked_for(hub) == [None, "bytes=10485760-", "bytes=20971520-"]


def test_a_download_that_broke_off_goes_on_at_the_next_start(hub, large):
    hub.break_after[large.name] = [11_000_000, *[0] * 6]
    message = refusal(LARGE)
    assert "the download broke off at 10.5 of 24.0 MB" in message
    assert "Start again: it goes on from there." in message
    hub.break_after.clear()
    hub.requests.clear()
    assert fetched(LARGE).path.read_bytes() == large.read_bytes()
    assert asked_for(hub) == ["bytes=10485760-"]


@pytest.mark.slow
def test_a_continued_file_with_other_content_is_not_used(hub, large):
    hub.break_after[large.name] = [11_000_000, *[0] * 6]
    refusal(LARGE)
    (partial,) = Path(constants.HF_HUB_CACHE).rglob("*.continued.incomplete")
    partial.write_bytes(b"x" * partial.stat().st_size)
    hub.break_after.clear()
    assert "parts do not belong together" in refusal(LARGE)
    assert fetched(LARGE).path.read_bytes() == large.read_bytes()


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    hub.add("acme/tiny", checkpoint("sdxl"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(wanted())
    assert "is not on this machine, and http://127.0.0.1:9 cannot be reached" in message
    assert "`hf download acme/tiny`" in message
    message = refusal(wanted("acme/tiny@v1/x.gguf"), offline=True)
    assert "`hf download acme/tiny x.gguf --revision v1` while online" in message
    assert "this host is offline" in message


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    hub.add("acme/tiny", checkpoint("sdxl"))
    hub.silent.set()
    assert f"{hub.url} cannot be reached" in refusal(wanted())


def test_an_outline_is_not_enough_offline(hub):
    hub.add("acme/tiny", checkpoint("sdxl"))
    locate(wanted(), offline=False)
    assert "Run `hf download acme/tiny` while online" in refusal(wanted(), offline=True)


def test_a_disk_that_is_too_small_is_refused_before_the_download(hub, monkeypatch):
    hub.add("acme/tiny", checkpoint("sdxl"))
    found = locate(wanted(), offline=False)
    sparse = dict.fromkeys(found.missing(variant="fp32", denoiser="unet"), 10**18)
    with pytest.raises(ConfigError) as caught:
        download([(found, sparse)], lambda done, total: None)
    assert "needs 4000000000.0 GB more in" in str(caught.value)
    assert "HF_HOME" in str(caught.value) and not hub.downloads(".safetensors")


def test_a_disk_that_fills_up_is_named(hub, tmp_path, monkeypatch):
    """Another program may take the space meanwhile: the limit on a file's size stands for it."""
    hub.add("acme/tiny", checkpoint("sdxl"))
    found = locate(wanted(), offline=False)
    monkeypatch.setattr(
        client,
        "PROGRAM",
        "import errno, sys, tempfile; import backends.hub.worker as it; "
        "import huggingface_hub.file_download as library\n"
        "def full(*arguments, **options): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "library.http_get = full",
    )
    with pytest.raises(ConfigError) as caught:
        download(
            [(found, found.missing(variant="fp32", denoiser="unet"))], lambda done, total: None
        )
    assert "is full" in str(caught.value) and "it goes on from there" in str(caught.value)


def test_sizes_are_readable():
    assert size_text(3_100_000_000, 6_900_000_000) == "3.1 of 6.9 GB"
    assert size_text(None, 2_400_000) == "2.4 MB" and size_text(1, 900) == "0.0 of 0.9 kB"
