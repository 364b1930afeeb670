"""Every field of every dialect's published protocol is done, neutral or refused; no other field is
taken in silence.
"""

import pytest
from openai.types import image_edit_params, image_generate_params, video_create_params

from backends.request import GenerateRequest
from hosts.compat import fields as compat
from hosts.dialects import a1111_fields, openai_fields
from hosts.http import jobs_api
from tests.checkpoints import sample_image
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost, message_of

A1111_BOTH = """
prompt negative_prompt styles seed subseed subseed_strength seed_resize_from_h seed_resize_from_w
sampler_name scheduler batch_size n_iter steps cfg_scale width height restore_faces tiling
do_not_save_samples do_not_save_grid eta denoising_strength s_min_uncond s_churn s_tmax s_tmin
s_noise override_settings override_settings_restore_afterwards refiner_checkpoint
refiner_switch_at disable_extra_networks comments force_task_id sampler_index script_name
script_args send_images save_images alwayson_scripts infotext
""".split()
A1111_TXT2IMG = """
firstpass_image enable_hr firstphase_width firstphase_height hr_scale hr_upscaler
hr_second_pass_steps hr_resize_x hr_resize_y hr_checkpoint_name hr_sampler_name hr_scheduler
hr_prompt hr_negative_prompt
""".split()
A1111_IMG2IMG = """
init_images resize_mode image_cfg_scale mask mask_blur_x mask_blur_y mask_blur mask_round
inpainting_fill inpaint_full_res inpaint_full_res_padding inpainting_mask_invert
initial_noise_multiplier latent_mask include_init_images
""".split()
"""The fields of StableDiffusionTxt2ImgProcessingAPI and StableDiffusionImg2ImgProcessingAPI."""
IMAGE = encode_file(sample_image(16))
PUBLISHED = {
    "/sdapi/v1/txt2img": (A1111_BOTH + A1111_TXT2IMG, a1111_fields.TXT2IMG),
    "/sdapi/v1/img2img": (A1111_BOTH + A1111_IMG2IMG, a1111_fields.IMG2IMG),
    "/v1/images/generations": (
        [*image_generate_params.ImageGenerateParamsBase.__annotations__, "stream"],
        openai_fields.IMAGES,
    ),
    "/v1/images/edits": (
        [*image_edit_params.ImageEditParamsBase.__annotations__, "stream"],
        openai_fields.EDITS,
    ),
    "/v1/videos": ([*video_create_params.VideoCreateParams.__annotations__], openai_fields.VIDEOS),
    "/v1/jobs": ([*GenerateRequest.model_fields], jobs_api.RULES),
    "/generate": ([*GenerateRequest.model_fields], compat.RULES),
}
NEEDED = {
    "/sdapi/v1/img2img": {"init_images": [IMAGE]},
    "/v1/images/edits": {"image": IMAGE},
    "/v1/videos": {"input_reference": IMAGE},
}
PATHS = sorted(PUBLISHED)


@pytest.fixture(scope="module")
def images():
    with ReadingHost() as host:
        yield host


@pytest.fixture(scope="module")
def videos():
    with ReadingHost(type="svd") as host:
        yield host


@pytest.fixture
def host(request, path):
    return request.getfixturevalue("videos" if path == "/v1/videos" else "images")


def body(path, **fields):
    return {**({"prompt": "a"} if path != "/v1/videos" else {}), **NEEDED.get(path, {}), **fields}


@pytest.mark.parametrize("path", PATHS)
def test_every_published_field_has_a_rule(path):
    published, rules = PUBLISHED[path]
    assert len(published) > 4
    assert not [name for name in published if name not in rules]
    assert {rule.kind for rule in rules.values()} <= {"done", "neutral", "refused"}
    assert all(rule.reason for rule in rules.values() if rule.kind != "done")


@pytest.mark.parametrize("path", PATHS)
def test_every_value_that_a_rule_does_not_allow_is_refused_by_name(host, path):
    for name, rule in PUBLISHED[path][1].items():
        if rule.accepted is None:
            continue
        answer = host.post(path, body(path, **{name: "nonsense-value"}))
        assert answer.status_code == 422, (name, answer.get_data(as_text=True))
        said = message_of(answer)
        assert said.startswith(f"{name}='nonsense-value' is not available: ") and "Leave" in said
        for value in (*rule.accepted, None, "", [], {}):
            answer = host.post(path, body(path, **{name: value}))
            assert answer.status_code in (200, 202), (name, value, answer.get_data(as_text=True))


@pytest.mark.parametrize("path", PATHS)
def test_values_of_fields_that_change_nothing_are_accepted(host, path):
    for name, rule in PUBLISHED[path][1].items():
        if rule.kind == "neutral" and rule.accepted is None:
            for value in ("text", 3, True, ["a"]):
                answer = host.post(path, body(path, **{name: value}))
                assert answer.status_code in (200, 202), (name, answer.get_data(as_text=True))


@pytest.mark.parametrize("path", PATHS)
def test_unknown_field_is_an_error_that_names_the_nearest(host, path):
    answer = host.post(path, body(path, negativ_prompt="x"))
    said = message_of(answer)
    assert answer.status_code == 400
    assert said.startswith("negativ_prompt is not a field") and "negative_prompt" in said
    for name in ("guidance_rescal", "x" * 5000, "a\u0000b", "\ud800", ""):
        assert host.post(path, body(path, **{name: 1})).status_code == 400, name
    assert host.post(path, body(path, negativ_prompt="x", strict=False)).status_code in (200, 202)
    assert host.post(path, body(path, strict="maybe")).status_code == 400


@pytest.mark.parametrize(
    "sent",
    [
        {"positive": "a", "steps": 2, "future": {"x": 1}, "control_image": "?", "frames": 9},
        {"steps": 2, "positive": "a", "width": 100, "height": 20, "ip_image": "garbage"},
        {"seed": 1, "cfg": 3, "positive": "a", "negativ_prompt": "x", "num_images": 3},
    ],
)
def test_existing_clients_keep_their_tolerance(images, sent):
    assert images.post("/generate", sent).status_code == 200


@pytest.mark.parametrize("path", ["/v1/jobs", "/generate"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"control_image": IMAGE}, "control_image"),
        ({"controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale"),
        ({"ip_adapter_image": IMAGE}, "ip_adapter_image"),
        ({"image": IMAGE}, "image"),
        ({"num_frames": 4}, "num_frames"),
        ({"motion_bucket_id": 4}, "motion_bucket_id"),
        ({"compel": True}, "compel"),
        ({"lora": {"a.safetensors": 1}}, "lora"),
    ],
)
def test_what_this_host_cannot_use_is_refused(images, path, fields, named):
    answer = images.post(path, {"prompt": "a", **fields})
    assert answer.status_code == 422
    assert message_of(answer).startswith(f"{named} is not available: ")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/jobs", {"negative_prompt": "x"}),
        ("/generate", {"negative_prompt": "x"}),
        ("/v1/images/generations", {"negative_prompt": "x"}),
        ("/sdapi/v1/txt2img", {"negative_prompt": "x"}),
    ],
)
def test_negative_prompt_of_a_distilled_model_is_refused(path, fields):
    with ReadingHost(type="flux") as host:
        answer = host.post(path, {"prompt": "a", **fields})
        assert answer.status_code == 422 and "is distilled" in message_of(answer)
        old = {"positive": "a", "negative": "x", "steps": 2}
        assert host.post("/generate", old).status_code == 200


@pytest.mark.parametrize(
    ("type_name", "size", "nearest"),
    [("sdxl", 100, "96 and 104"), ("flux", 120, "112 and 128"), ("zimage", 1080, "1072 and 1088")],
)
def test_sizes_are_exact_or_refused_with_the_two_nearest(type_name, size, nearest):
    with ReadingHost(type=type_name) as host:
        for path, fields in (
            ("/v1/jobs", {"width": size}),
            ("/generate", {"width": size}),
            ("/v1/images/generations", {"size": f"{size}x64"}),
            ("/sdapi/v1/txt2img", {"width": size}),
        ):
            answer = host.post(path, {"prompt": "a", **fields})
            assert answer.status_code == 400 and nearest in message_of(answer), path
        assert host.post("/generate", {"positive": "a", "width": size}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/jobs", "/generate", "/v1/images/generations",
                                  "/sdapi/v1/txt2img"])  # fmt: skip
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_text_that_cannot_be_encoded_is_the_clients_mistake(images, path, name):
    for text in ("a cat \ud83d", "\udfff"):
        answer = images.post(path, {"prompt": "a", name: text})
        assert answer.status_code == 400, path
        assert name in message_of(answer) and "half of a surrogate pair" in message_of(answer)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/jobs", "prompt", 5),
        ("/v1/jobs", "num_inference_steps", 0),
        ("/v1/jobs", "guidance_scale", -1),
        ("/v1/jobs", "strength", 2),
        ("/v1/jobs", "num_inference_steps", 10**6),
        ("/generate", "steps", 0),
        ("/generate", "num_inference_steps", 0),
        ("/v1/images/generations", "steps", 0),
        ("/v1/images/generations", "guidance", -1),
        ("/v1/images/generations", "n", 0),
        ("/v1/images/generations", "n", 1.5),
        ("/sdapi/v1/txt2img", "steps", 0),
        ("/sdapi/v1/txt2img", "cfg_scale", -1),
        ("/sdapi/v1/txt2img", "n_iter", 0),
        ("/sdapi/v1/img2img", "denoising_strength", 2),
        ("/v1/jobs", "sigmas", [float("inf")]),
        ("/v1/jobs", "timesteps", [float("nan")]),
        ("/v1/jobs", "sigmas", [10**400]),
        ("/v1/jobs", "guidance_scale", True),
    ],
)
def test_messages_name_the_field_as_it_was_sent(images, path, field, value):
    answer = images.post(path, body(path, **{field: value}))
    assert answer.status_code == 400 and message_of(answer).startswith(field), message_of(answer)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("data", "said"),
    [(b'{"prompt": "a",}', "line 1 column 1"), (b'{"a": "\xff"}', "utf-8"), (b"", "line 1")],
)
def test_broken_json_is_told_with_its_place(host, path, data, said):
    answer = host.client.post(path, data=data, content_type="application/json")
    assert answer.status_code == 400 and said in message_of(answer)


def test_image_to_start_from_acts_by_default(images):
    start = {"prompt": "a", "seed": 1, "init_image": IMAGE}
    assert images.is_same("/v1/jobs", start, {**start, "strength": 0.8})
    assert images.is_same("/generate", start, {**start, "strength": 0.8})
    assert images.is_same("/v1/images/edits", {"prompt": "a", "seed": 1, "image": IMAGE}, start)
    assert images.reads("/v1/jobs", {**start, "strength": 1})[0].strength == 1
    assert images.reads("/v1/jobs", {"prompt": "a"})[0].strength == 1


def test_two_images_of_a_field_that_has_one_are_refused(images):
    for path, fields in (
        ("/v1/jobs", {"init_image": [IMAGE, IMAGE]}),
        ("/generate", {"init_image": [IMAGE, IMAGE]}),
        ("/v1/images/edits", {"image": [IMAGE, IMAGE]}),
        ("/sdapi/v1/img2img", {"init_images": [IMAGE, IMAGE]}),
    ):
        answer = images.post(path, {"prompt": "a", **fields})
        assert answer.status_code in (400, 422) and "image" in message_of(answer), path
