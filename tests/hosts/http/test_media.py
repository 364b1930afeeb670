"""Results as files: what comes out decodes again to what went in."""

import base64
import io
import subprocess
from dataclasses import replace

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from backends.errors import RequestError
from backends.request import Audio, GenerateResult
from hosts.http import media


def result(num_frames=1, height=48, width=64):
    """Smooth frames, each of another shade, so that lossy formats keep them."""
    y, x = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([x * 3, y * 4, np.full_like(x, 40 + 60 * n)], axis=-1) for n in range(num_frames)
    ]
    return GenerateResult(
        frames=np.stack(frames).astype(np.uint8),
        latents=None,
        seed=1,
        num_steps=2,
        exactness="exact",
        seconds=0.1,
    )


def opened(data):
    return Image.open(io.BytesIO(data))


def test_png_keeps_every_pixel():
    made = result()
    sample_image = opened(media.encode(made, "image/png"))
    assert sample_image.format == "PNG" and sample_image.mode == "RGB"
    assert (np.asarray(sample_image) == made.frames[0]).all()


def test_every_image_of_one_call_is_in_the_json_with_its_transparent_parts():
    alpha = np.full((3, 48, 64, 1), 128, np.uint8)
    made = result(num_frames=3)
    layers = replace(made, frames=np.concatenate([made.frames, alpha], axis=-1))
    texts = media.as_json(layers, "image")["outputs"]
    found = [opened(base64.b64decode(text)) for text in texts]
    assert {(one.format, one.mode) for one in found} == {("PNG", "RGBA")}
    assert (np.stack([np.asarray(one) for one in found]) == layers.frames).all()
    assert "outputs" not in media.as_json(result(), "image")
    first = media.each_image(layers, "image")[0]
    assert opened(media.encode(first, "image/jpeg")).mode == "RGB"  # it has no transparency


@pytest.mark.parametrize(("content_type", "name"), [("image/jpeg", "JPEG"), ("image/webp", "WEBP")])
def test_lossy_image_is_close(content_type, name):
    made = result()
    sample_image = opened(media.encode(made, content_type))
    assert sample_image.format == name and sample_image.size == (64, 48)
    assert np.abs(np.asarray(sample_image.convert("RGB")).astype(int) - made.frames[0]).mean() < 4


def test_gif_holds_every_frame_at_seven_per_second():
    gif = opened(media.encode(result(num_frames=3), "image/gif"))
    assert (gif.format, gif.n_frames, gif.size) == ("GIF", 3, (64, 48))
    assert gif.info["duration"] == pytest.approx(1000 / 7, abs=5)


def test_mp4_holds_every_frame():
    made = result(num_frames=5)
    frames = imageio.imread(media.encode(made, "video/mp4"), extension=".mp4", plugin="FFMPEG")
    assert frames.shape == (5, 48, 64, 3)
    assert np.abs(frames.astype(int) - made.frames).mean() < 8


def tone(hertz, rate=16000):
    """One second of two channels, of which the second is silent."""
    wave = np.sin(2 * np.pi * hertz * np.arange(rate) / rate)
    samples = 0.5 * np.stack([wave, 0 * wave])
    return Audio(samples=samples.astype(np.float32), sampling_rate=rate)


def test_mp4_holds_the_sound(tmp_path):
    path = tmp_path / "film.mp4"
    made = replace(result(num_frames=7), audio=tone(440))
    path.write_bytes(media.encode(made, "video/mp4"))
    program = imageio_ffmpeg.get_ffmpeg_exe()
    wanted = ("-i", str(path), "-f", "f32le", "-ac", "2", "-ar", "16000", "-")
    raw = subprocess.run([program, *wanted], capture_output=True, check=True).stdout
    sound = np.frombuffer(raw, np.float32).reshape(-1, 2)[:16000].T
    strongest = np.abs(np.fft.rfft(sound[0])).argmax() * 16000 / sound.shape[1]
    assert abs(strongest - 440) < 2
    assert np.abs(sound[1]).max() < 0.01 < np.abs(sound[0]).max()


def test_the_whole_result_keeps_the_sound():
    made = replace(result(num_frames=2), audio=tone(440))
    found = media.decode_whole(media.encode(made, media.WHOLE_TYPE))
    assert found.audio.sampling_rate == 16000
    np.testing.assert_array_equal(found.audio.samples, made.audio.samples)


def test_mp4_of_odd_size_loses_a_row_and_a_column_only():
    frames = imageio.imread(
        media.encode(result(num_frames=2, height=49, width=63), "video/mp4"),
        extension=".mp4",
        plugin="FFMPEG",
    )
    assert frames.shape == (2, 48, 62, 3)


@pytest.mark.parametrize("content_type", ["image/png", "image/jpeg", "image/webp"])
def test_video_is_not_sent_as_one_image(content_type):
    with pytest.raises(
        RequestError,
        match=(
            r"does not fit a video\. Allowed: video/mp4, image/gif, application/x-npy, "
            r"application/x-npz, application/json"
        ),
    ) as caught:
        media.encode(result(num_frames=2), content_type)
    assert caught.value.field == "Accept"


@pytest.mark.parametrize("num_frames", [1, 3])
def test_array_holds_every_frame_as_it_is(num_frames):
    made = result(num_frames=num_frames)
    assert (
        np.load(io.BytesIO(media.encode(made, "application/x-npy")), allow_pickle=False)
        == made.frames
    ).all()


@pytest.mark.parametrize(
    "latents",
    [None, np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)],
    ids=["without latents", "with latents"],
)
def test_npz_holds_everything_there_is_of_a_result(latents):
    made = replace(
        result(num_frames=2), latents=latents, report={"ranks": 2}, resolved={"prompt": "a cat"}
    )
    data = media.encode(made, "application/x-npz")
    again = media.decode_whole(data)
    assert (again.frames == made.frames).all()
    assert again.latents is None if latents is None else (again.latents == latents).all()
    assert replace(again, frames=None, latents=None) == replace(made, frames=None, latents=None)
    assert set(np.load(io.BytesIO(data), allow_pickle=False)) == {"frames", "facts"} | (
        {"latents"} if latents is not None else set()
    )


def test_video_plays_at_the_speed_that_was_asked_for():
    assert (
        opened(media.encode(result(num_frames=3), "image/gif", frames_per_s=20)).info["duration"]
        == 50
    )


def test_video_plays_at_the_speed_that_it_was_generated_for():
    """Of the request, else of its type: the pipeline writes it into the resolved request."""
    made = replace(result(num_frames=4), resolved={"fps": 16})
    assert opened(media.encode(made, "image/gif")).info["duration"] == pytest.approx(62.5, abs=5)
    film = media.encode(made, "video/mp4")
    assert imageio.immeta(film, extension=".mp4", plugin="FFMPEG")["fps"] == 16
    slower = media.encode(made, "video/mp4", frames_per_s=4)
    assert imageio.immeta(slower, extension=".mp4", plugin="FFMPEG")["fps"] == 4
