"""The LocalAI backend over a real gRPC channel, before real hosts."""

import base64
import importlib
import io
import json
import signal
import subprocess

import grpc
import imageio.v3 as imageio
import numpy as np
import psutil
import pytest
from PIL import Image

from hosts.http.server import is_port_free
from tests.backends.features import half_mask
from tests.checkpoints import checkpoint, sample_image
from tests.clients.localai import FOLDER, LocalAI, failure
from tests.hosts.client import decode
from tests.hosts.harness import free_port, wait_until
from tests.hosts.inprocess import InProcessHost


def drawn(host, **fields):
    return np.asarray(
        decode(
            host.generate_image(
                {"positive": "a red car", "seed": 5, "steps": 4, "cfg": 6.0, **fields}
            )["output"]
        )
    )


def test_messages_have_localais_field_numbers(backend):
    """Bytes as LocalAI's own stubs write them: field number * 8 + wire type, then the value."""
    image = backend.pb.GenerateImageRequest.FromString(
        b"\x08\x40\x10\x48\x20\x04\x28\x05"
        + b"\x32\x01p\x3a\x01n\x42\x01d\x4a\x01s\x58\x02\x62\x01r"
    )
    assert (image.height, image.width, image.step, image.seed, image.CLIPSkip) == (64, 72, 4, 5, 2)
    assert (
        image.positive_prompt,
        image.negative_prompt,
        image.dst,
        image.src,
        list(image.ref_images),
    ) == ("p", "n", "d", "s", ["r"])
    video = backend.pb.GenerateVideoRequest.FromString(
        b"\x0a\x01p\x1a\x01s\x38\x03\x40\x0a\x48\x05\x58\x02\x62\x01d"
    )
    assert (
        video.prompt,
        video.start_image,
        video.num_frames,
        video.fps,
        video.seed,
        video.step,
        video.dst,
    ) == ("p", "s", 3, 10, 5, 2, "d")
    model = backend.pb.ModelOptions.FromString(
        b"\x0a\x01m\xaa\x01\x01f\xd2\x01\x01t\xda\x01\x01s\xda\x03\x01P\xf2\x03\x03a:b"
    )
    assert (
        model.Model,
        model.ModelFile,
        model.PipelineType,
        model.SchedulerType,
        model.ModelPath,
    ) == ("m", "f", "t", "s", "P")
    assert list(model.Options) == ["a:b"]
    assert backend.pb.Result(message="m", success=True).SerializeToString() == b"\x0a\x01m\x10\x01"


def test_image_is_what_the_host_draws(loaded, host, tmp_path):
    dst = tmp_path / "image.png"
    request = loaded.pb.GenerateImageRequest(
        positive_prompt="a red car", seed=5, step=4, width=64, height=64, dst=str(dst)
    )
    answer = loaded.call("GenerateImage", request)
    assert answer.success and answer.message.startswith("seed 5, ")
    assert (np.asarray(Image.open(dst)) == drawn(host)).all()
    state = loaded.call("Status")
    assert (
        state.state == loaded.pb.StatusResponse.READY
        and state.memory.total == state.memory.breakdown["rank 0"] > 1e8
    )
    assert loaded.call("Health").message == b"OK"


def test_image_starts_from_the_callers_image(loaded, host, tmp_path):
    source, dst = tmp_path / "b64123456", tmp_path / "out.png"
    sample_image(64).save(source, format="PNG")
    request = loaded.pb.GenerateImageRequest(
        positive_prompt="a red car", seed=5, step=4, src=str(source), dst=str(dst)
    )
    assert loaded.call("GenerateImage", request).success
    encoded = base64.b64encode(source.read_bytes()).decode()
    assert (np.asarray(Image.open(dst)) == drawn(host, init_image=encoded, strength=0.5)).all()


def test_caller_that_gives_up_cancels_the_job(loaded, host, tmp_path):
    request = loaded.pb.GenerateImageRequest(
        positive_prompt="a", step=900, dst=str(tmp_path / "x.png")
    )
    call = loaded.start("GenerateImage", request)
    wait_until(lambda: _running(host) is not None, within_s=30, what="it runs")
    job = _running(host)
    assert loaded.call("Status").state == loaded.pb.StatusResponse.BUSY
    call.cancel()
    assert job.finished.wait(20) and "cancelled" in str(job.error)


def _running(host):
    return next(
        (job for job in host.queue.jobs() if job.step > 0 and not job.finished.is_set()), None
    )


def test_freed_model_generates_no_more(loaded):
    assert loaded.call("Free").success
    code, details = failure(loaded, "GenerateImage", positive_prompt="a", dst="x")
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "no model is loaded" in details


@pytest.mark.parametrize(
    ("method", "fields", "code", "message"),
    [
        ("GenerateImage", {"step": 9999}, "INVALID_ARGUMENT", "steps=9999 is not allowed"),
        ("GenerateImage", {"height": 9000}, "INVALID_ARGUMENT", "height=9000"),
        ("GenerateImage", {"ref_images": ["x"]}, "INVALID_ARGUMENT", "takes no reference images"),
        ("GenerateImage", {"dst": "/nowhere/x.png"}, "FAILED_PRECONDITION", "No such file"),
        ("GenerateVideo", {}, "INVALID_ARGUMENT", "makes no videos"),
    ],
)
def test_refusals_are_errors_of_grpc(loaded, method, fields, code, message, tmp_path):
    prompt = {"positive_prompt": "a", "step": 2} if method == "GenerateImage" else {"prompt": "a"}
    given = {**prompt, "dst": str(tmp_path / "x.png"), **fields}
    found, details = failure(loaded, method, **given)
    assert found is grpc.StatusCode[code] and message in details


def test_job_that_is_cancelled_elsewhere_is_an_error_of_grpc(loaded, host, tmp_path):
    request = loaded.pb.GenerateImageRequest(
        positive_prompt="a", step=900, dst=str(tmp_path / "x.png")
    )
    call = loaded.start("GenerateImage", request)
    wait_until(lambda: _running(host) is not None, within_s=30, what="it runs")
    host.queue.cancel(_running(host))
    assert call.exception(timeout=30).code() is grpc.StatusCode.ABORTED
    assert "cancelled" in call.exception().details()


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_inpainting_sends_image_and_mask_in_a_json_file(loaded, host, tmp_path):
    """As LocalAI does: the same two are reference images as well."""
    image, mask = png_bytes(sample_image(64)), png_bytes(half_mask(64, 64))
    encoded = {
        name: base64.b64encode(data).decode()
        for name, data in (("image", image), ("mask_image", mask))
    }
    source, dst = tmp_path / "inpaint_1.json", tmp_path / "out.png"
    source.write_text(json.dumps(encoded))
    (tmp_path / "refimg_1").write_bytes(image)
    (tmp_path / "refmask_1").write_bytes(mask)
    request = loaded.pb.GenerateImageRequest(
        positive_prompt="a red car", seed=5, step=4, width=64, height=64, src=str(source),
        dst=str(dst), ref_images=[str(tmp_path / "refimg_1"), str(tmp_path / "refmask_1")],
    )  # fmt: skip
    assert loaded.call("GenerateImage", request).success
    expected = drawn(
        host, init_image=encoded["image"], mask_image=encoded["mask_image"], strength=0.5
    )
    assert (np.asarray(Image.open(dst)) == expected).all()


@pytest.mark.parametrize("text", ["{}", "{broken", '{"image": 5, "mask_image": ""}'])
def test_json_file_without_image_and_mask_is_refused(loaded, tmp_path, text):
    source = tmp_path / "inpaint_1.json"
    source.write_text(text)
    code, details = failure(loaded, "GenerateImage", positive_prompt="a", src=str(source), dst="x")
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "image and mask_image" in details


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Options": ["url:http://127.0.0.1:9"]}, "does not answer"),
        (
            {"Model": "missing", "ModelPath": "/nowhere", "PipelineType": "sdxl"},
            "/nowhere/missing does not exist",
        ),
        ({"Options": ["strength:much"]}, "strength:much is not allowed"),
        ({"Options": ["url:hello world"]}, "the address 'hello world' is not allowed"),
        ({"Options": ["patience:-1"]}, "patience:-1 is not allowed"),
        ({"PipelineType": "nonsense"}, "type='nonsense' is not a model type"),
    ],
)
def test_model_that_cannot_be_loaded_says_why(localai, fields, message):
    answer = localai.load(**fields)
    assert not answer.success and message in answer.message
    code, details = failure(localai, "GenerateImage", positive_prompt="a", dst="x")
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "no model is loaded" in details
    assert localai.call("Status").state == localai.pb.StatusResponse.UNINITIALIZED


def test_other_model_at_the_address_is_refused(localai, host):
    answer = localai.load(PipelineType="flux", Options=[f"url:{host.url('')}"])
    assert not answer.success and "serves sdxl, not flux" in answer.message


def test_video_has_the_frames_and_the_speed_that_were_asked_for(localai, tmp_path):
    with InProcessHost(type="svd", checkpoint=str(checkpoint("svd"))) as host:
        assert localai.load(Options=[f"url:{host.url('')}"]).success
        source, dst = tmp_path / "start.png", tmp_path / "out.mp4"
        sample_image(64).save(source)
        request = localai.pb.GenerateVideoRequest(
            start_image=str(source), num_frames=3, step=2, seed=5, fps=12, dst=str(dst)
        )
        answer = localai.call("GenerateVideo", request)
        assert answer.success, answer.message
        meta = imageio.immeta(dst, plugin="FFMPEG")
        assert meta["fps"] == 12 and len(imageio.imread(dst, plugin="FFMPEG")) == 3


def test_fields_of_localai_become_arguments_of_the_host(backend, tmp_path):
    for name in ("model", "a.safetensors", "control"):
        (tmp_path / name).mkdir()
    choice = importlib.import_module("model").read_options(
        backend.pb.ModelOptions(
            Model="model", ModelPath=str(tmp_path), PipelineType="sdxl", SchedulerType="euler",
            F16Memory=True, ControlNet="control",
            LoraAdapters=["a.safetensors"], LoraScales=[0.8], CFGScale=7.5, CLIPSkip=1,
            Options=["nproc-per-node:2", "compile_unet", "scheduler:ddim", 'lora_dir:/a:/b'],
        )
    )  # fmt: skip
    assert choice.arguments == (
        "--type=sdxl", f"--checkpoint={tmp_path}/model", "--scheduler=ddim", "--variant=fp16",
        f'--lora={{"{tmp_path}/a.safetensors": 0.8}}', f"--control_net={tmp_path}/control",
        "--nproc_per_node=2", "--compile_unet", "--lora_dir=/a:/b",
    )  # fmt: skip
    assert choice.defaults == {"guidance_scale": 7.5, "clip_skip": 1}


@pytest.mark.slow
def test_host_that_died_is_started_again_at_the_next_request(localai, tmp_path):
    """Also at a port that its ranks may still hold."""
    answer = localai.load(
        ModelFile=str(checkpoint("sdxl")),
        PipelineType="sdxl",
        Options=["height:64", "width:64", f"port:{free_port()}"],
    )
    assert answer.success, answer.message
    (launcher,) = [
        child for child in psutil.Process().children() if "launcher.py" in " ".join(child.cmdline())
    ]
    launcher.send_signal(signal.SIGKILL)
    wait_until(
        lambda: launcher.status() == psutil.STATUS_ZOMBIE, within_s=10, what="the launcher is gone"
    )
    request = localai.pb.GenerateImageRequest(
        positive_prompt="a", step=2, dst=str(tmp_path / "x.png")
    )
    assert localai.call("GenerateImage", request).success
    assert Image.open(tmp_path / "x.png").size == (64, 64)


@pytest.mark.slow
def test_backend_as_localai_starts_it_starts_a_host_and_takes_it_along(backend, tmp_path):
    port = free_port()
    program = subprocess.Popen([FOLDER / "run.sh", "--addr", f"127.0.0.1:{port}"], cwd=tmp_path)
    client = LocalAI(port, backend.pb)
    try:
        wait_until(lambda: _answers(client), within_s=30, what="it listens")
        answer = client.load(
            Model="sdxl",
            ModelFile=str(checkpoint("sdxl")),
            PipelineType="sdxl",
            Options=["height:64", "width:64", f"port:{(served := free_port())}"],
        )
        assert answer.success, answer.message
        dst = tmp_path / "x.png"
        made = client.call(
            "GenerateImage",
            client.pb.GenerateImageRequest(positive_prompt="a", step=2, dst=str(dst)),
        )
        assert made.success and Image.open(io.BytesIO(dst.read_bytes())).size == (64, 64)
    finally:
        client.close()
        program.terminate()
        program.wait(timeout=30)
    wait_until(lambda: _is_free(served), within_s=5, what="the host is gone")


def _answers(client):
    try:
        return client.call("Health").message == b"OK"
    except grpc.RpcError:
        return False


def _is_free(port):
    return is_port_free("127.0.0.1", port)
