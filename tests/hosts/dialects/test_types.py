"""What a request may ask of each model type, in every dialect: sizes, lengths, images, settings."""

import json

import pytest

from backends.model_table import read_table
from tests.checkpoints import sample_image
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost, message_of
from tests.hosts.dialects.test_rules import IMAGE

TABLE = read_table()
IMAGE_CALLS = ("/v1/jobs", "/generate", "/v1/images/generations", "/sdapi/v1/txt2img")
CALLS = {"image": IMAGE_CALLS, "video": ("/v1/jobs", "/generate", "/v1/videos")}


def needed(name):
    """The images that every request of a type must bring."""
    fields = ("image", "init_image", "mask_image", "video")
    return {field: IMAGE for field in fields if field in TABLE[name].requires}


@pytest.mark.parametrize(
    "name", [name for name, spec in TABLE.items() if spec.guidance == "distilled"]
)
def test_negative_prompt_of_a_distilled_model_is_refused(name):
    with ReadingHost(type=name) as host:
        for path in CALLS[TABLE[name].output]:
            answer = host.post(path, {"prompt": "a", "negative_prompt": "x"})
            said = message_of(answer)
            # a row that lists its fields refuses all others alike
            why = "does not take it" if TABLE[name].takes else "is distilled"
            assert answer.status_code == 422 and why in said
        old = {"positive": "a", "negative": "x", "steps": 2, **needed(name)}
        assert host.post("/generate", old).status_code == 200


@pytest.mark.parametrize("name", list(TABLE))
def test_sizes_are_exact_or_refused_with_the_two_nearest(name):
    multiple = TABLE[name].size_multiple
    below, size, above = 6 * multiple, 6 * multiple + multiple // 2, 7 * multiple
    with ReadingHost(type=name) as host:
        for path in CALLS[TABLE[name].output]:
            has_both = path in ("/v1/images/generations", "/v1/videos")
            sent = {"size": f"{size}x{above}"} if has_both else {"width": size}
            answer = host.post(path, {"prompt": "a", **sent})
            said = message_of(answer)
            if TABLE[name].takes and "width" not in TABLE[name].takes:  # its image has the size
                assert answer.status_code == 422 and "does not take it" in said, path
                continue
            assert answer.status_code == 400 and f"nearest are {below} and {above}" in said, path
        old = {"positive": "a", "width": size, **needed(name)}
        assert host.post("/generate", old).status_code == 200


VIDEO_TYPES = [name for name, spec in TABLE.items() if spec.frame_step > 1]


@pytest.mark.parametrize("name", VIDEO_TYPES)
def test_lengths_of_videos_are_exact_or_refused_with_the_two_nearest(name):
    step = TABLE[name].frame_step
    below, above = (33, 65) if name == "helios" else (2 * step + 1, 3 * step + 1)
    given = {"prompt": "a", **needed(name)}
    with ReadingHost(type=name) as host:
        for path, said in (
            ("/v1/jobs", f"num_frames={below + 1} is not a length"),
            ("/generate", f"num_frames={below + 1} is not a length"),
            ("/v1/videos", f"num_frames={below + 1} is not a length"),
        ):
            answer = host.post(path, {**given, "num_frames": below + 1})
            assert answer.status_code == 400 and message_of(answer).startswith(said), path
            assert f"nearest are {below} and {above}" in message_of(answer), path
        assert host.reads("/v1/jobs", {**given, "num_frames": below})[0].num_frames == below
        if "video" not in needed(name):
            seconds = {**given, "fps": 10, "seconds": (below + 1) / 10}
            assert host.reads("/v1/videos", seconds)[0].num_frames == below
        old = {"positive": "a", "frames": below + 1, **needed(name)}
        assert host.post("/generate", old).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, spec in TABLE.items()
        if spec.output == "image" and (not spec.takes or "image" in spec.takes)
    ],
)
def test_img2img_of_a1111_starts_from_the_image_in_each_type(name):
    with ReadingHost(type=name) as host:
        image = encode_file(sample_image(64))  # FLUX.2 takes no smaller one
        sent = {"prompt": "a", "init_images": [image], "denoising_strength": None}
        sent |= {"mask": IMAGE} if "mask_image" in TABLE[name].requires else {}
        (read,) = host.reads("/sdapi/v1/img2img", sent)
        if read.init_image is not None:
            assert read.strength == 0.75
        else:
            assert read.image is not None and read.strength == 1
        answer = host.post("/sdapi/v1/img2img", {"prompt": "a", "init_images": ["x"]})
        assert answer.status_code == 400 and message_of(answer).startswith("init_images: ")


def test_img2img_of_a_type_that_takes_no_image_is_refused():
    with ReadingHost(type="bria") as host:
        answer = host.post("/sdapi/v1/img2img", {"prompt": "a", "init_images": [IMAGE]})
        assert answer.status_code == 422
        assert message_of(answer).startswith("init_images is not available: Bria 3.2 does not")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("flux", {"clip_skip": 1}),
        ("zimage", {"clip_skip": 2}),
        ("wan_t2v", {"decode_chunk_size": 2}),
        ("wan_t2v", {"clip_skip": 1}),
    ],
)
def test_settings_that_the_class_does_not_have_are_refused(name, fields):
    with ReadingHost(type=name) as host:
        answer = host.post("/v1/jobs", {"prompt": "a", **fields})
        assert answer.status_code == 422 and message_of(answer).startswith(next(iter(fields)))
        assert host.reads("/v1/jobs", {"prompt": "a", "clip_skip": 0})
        if TABLE[name].output == "image":  # A1111's default is the last layer
            body = {"prompt": "a", "override_settings": {"CLIP_stop_at_last_layers": 1}}
            assert host.reads("/sdapi/v1/txt2img", body)


@pytest.mark.parametrize("name", ["zimage", "krea2", "chroma", "sdxl", "sd3"])
def test_a_guidance_scale_is_counted_as_the_model_counts_it(name):
    """1 is off in A1111 and Forge. Z-Image and Krea 2 add to 1, so that 0 is off."""
    above = 1 if name in ("zimage", "krea2") else 0
    plain = {"prompt": "a", "seed": 1}
    with ReadingHost(type=name) as host:
        for scale in (1, 4.5, "4"):
            wanted = {**plain, "guidance_scale": float(scale) - above}
            assert host.is_same("/sdapi/v1/txt2img", {**plain, "cfg_scale": scale}, wanted)
        answer = host.post("/sdapi/v1/txt2img", {**plain, "cfg_scale": -1})
        assert answer.status_code == 400 and message_of(answer).startswith("cfg_scale=-1")
        info = json.loads(
            host.post("/sdapi/v1/txt2img", {**plain, "cfg_scale": 6}).get_json()["info"]
        )
        assert info["cfg_scale"] == 5.0 + above  # what it resolves to is 5 here
        assert ("Guidance scale: 5.0" in info["infotexts"][0]) is bool(above)
        if TABLE[name].returns_latents:
            hires = {**plain, "cfg_scale": 1, "enable_hr": True, "hr_cfg": 3, "hr_scale": 2}
            *_, second = host.reads("/sdapi/v1/txt2img", {**hires, "width": 64, "height": 64})
            assert second.guidance_scale == 3 - above
