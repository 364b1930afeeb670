"""Every field of every dialect's published protocol is done, neutral or refused; no other field is
taken in silence.
"""

import numpy as np
import pytest
from openai.types import (
    image_create_variation_params,
    image_edit_params,
    image_generate_params,
    video_create_params,
    video_remix_params,
)

from backends.request import GenerateRequest
from hosts.compat import fields as compat
from hosts.dialects import (
    a1111_extras,
    a1111_fields,
    a1111_lists,
    a1111_options,
    openai_fields,
)
from hosts.http import jobs_api
from hosts.http.media import npy
from tests.checkpoints import sample_image
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost, message_of, param_of

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
A1111_EXTRAS = """
image resize_mode show_extras_results gfpgan_visibility codeformer_visibility codeformer_weight
upscaling_resize upscaling_resize_w upscaling_resize_h upscaling_crop upscaler_1 upscaler_2
extras_upscaler_2_visibility upscale_first
""".split()
"""The fields of ExtrasSingleImageRequest."""
A1111_OPTIONS = """
samples_save samples_format save_images_add_number grid_save grid_format return_grid enable_pnginfo
save_mask jpeg_quality webp_lossless export_for_4chan outdir_txt2img_samples save_to_dirs
sd_model_checkpoint sd_checkpoint_cache sd_vae sd_unet sd_lora emphasis comma_padding_backtrack
CLIP_stop_at_last_layers sdxl_clip_l_skip upcast_attn randn_source tiling sdxl_crop_top
inpainting_mask_weight initial_noise_multiplier img2img_extra_noise img2img_color_correction
img2img_fix_steps img2img_background_color face_restoration cross_attention_optimization
s_min_uncond token_merging_ratio pad_cond_uncond fp8_storage sd_hypernetwork
extra_networks_default_multiplier add_model_hash_to_info live_previews_enable show_progress_type
eta_ddim eta_ancestral ddim_discretize s_churn s_tmin s_tmax s_noise sigma_min sigma_max rho
eta_noise_seed_delta always_discard_next_to_last_sigma sgm_noise_multiplier uni_pc_variant
uni_pc_skip_type uni_pc_order uni_pc_lower_order_final sd_noise_schedule skip_early_cond
beta_dist_alpha use_old_scheduling use_downcasted_alpha_bar disabled_extensions sd_checkpoint_hash
""".split()
"""The options that concern images or that programs send, of OptionsModel."""
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
    "/v1/images/variations": (
        [*image_create_variation_params.ImageCreateVariationParams.__annotations__],
        openai_fields.VARIATIONS,
    ),
    "/sdapi/v1/extra-single-image": (A1111_EXTRAS, a1111_extras.RULES),
    "/sdapi/v1/png-info": (["image"], a1111_lists.PNG_INFO),
    "/sdapi/v1/options": (A1111_OPTIONS, a1111_options.RULES),
    "/v1/videos": ([*video_create_params.VideoCreateParams.__annotations__], openai_fields.VIDEOS),
    "/v1/jobs": ([*GenerateRequest.model_fields], jobs_api.RULES),
    "/generate": ([*GenerateRequest.model_fields], compat.RULES),
}
NEEDED = {
    "/sdapi/v1/img2img": {"init_images": [IMAGE]},
    "/v1/images/edits": {"image": IMAGE},
    "/v1/images/variations": {"image": IMAGE},
    "/sdapi/v1/extra-single-image": {"image": IMAGE},
    "/sdapi/v1/png-info": {"image": IMAGE},
    "/v1/videos": {"input_reference": IMAGE},
}
PATHS = sorted(PUBLISHED)
NEAREST = {
    "/sdapi/v1/extra-single-image": "upscaling_resize",
    "/sdapi/v1/png-info": "image",
    "/sdapi/v1/options": "sd_vae",
}
"""Calls without a negative prompt -> a field of theirs."""
WITHOUT_PROMPT = ("/v1/videos", *NEAREST)
NUMBERED = ("/v1/jobs", "/generate", "/v1/images/generations")
OPENAI = [path for path in PATHS if path.startswith(("/v1/images", "/v1/videos"))]


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
    own = {} if path in WITHOUT_PROMPT else {"prompt": "a"}
    return {**own, **NEEDED.get(path, {}), **fields}


@pytest.mark.parametrize("path", PATHS)
def test_every_published_field_has_a_rule(path):
    published, rules = PUBLISHED[path]
    assert published
    assert not [name for name in published if name not in rules]
    assert {rule.kind for rule in rules.values()} <= {"done", "neutral", "refused"}
    assert all(rule.reason for rule in rules.values() if rule.kind != "done")


def test_every_published_field_of_a_remix_has_a_rule():
    published = video_remix_params.VideoRemixParams.__annotations__
    assert published.keys() <= openai_fields.REMIX.keys()


@pytest.mark.parametrize("path", PATHS)
def test_every_value_that_a_rule_does_not_allow_is_refused_by_name(host, path):
    for name, rule in PUBLISHED[path][1].items():
        if rule.accepted is None:
            continue
        answer = host.post(path, body(path, **{name: "nonsense-value"}))
        assert answer.status_code == 422, (name, answer.get_data(as_text=True))
        said = message_of(answer)
        assert said.startswith(f"{name}='nonsense-value' is not available: ") and "Leave" in said
        assert param_of(answer) == (name if path in OPENAI else None)
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
    right = NEAREST.get(path, "negative_prompt")
    wrong = right.replace("ve_", "v_").removesuffix("e")
    answer = host.post(path, body(path, **{wrong: "x"}))
    said = message_of(answer)
    assert answer.status_code == 400
    assert said.startswith(f"{wrong} is not a field") and f"{right}." in said
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


@pytest.mark.parametrize("path", NUMBERED)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"control_image": IMAGE}, "control_image"),
        ({"controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale"),
        ({"ip_adapter_image": IMAGE}, "ip_adapter_image"),
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
    assert param_of(answer) == (named if path in OPENAI else None)


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/v1/images/edits", {"image": [IMAGE, IMAGE]}, "image"),
        ("/v1/images/edits", {"image": [{"image_url": "https://a.example/x.png"}]}, "image"),
        ("/v1/images/generations", {"prompt": "[a:b:0.5]", "prompt_syntax": "a1111"}, "prompt"),
        ("/v1/images/generations", {"style": "cubist"}, "style"),
    ],
)
def test_what_is_unsupported_is_told_with_its_field(images, path, fields, named):
    answer = images.post(path, body(path, **fields))
    assert (answer.status_code, param_of(answer)) == (422, named), message_of(answer)


@pytest.mark.parametrize("value", [999.5, 0.1, "999.5"])
def test_timesteps_that_are_no_whole_numbers_are_refused(images, value):
    for path in ("/v1/jobs", "/generate"):
        answer = images.post(path, {"prompt": "a", "timesteps": [value, 0]})
        assert answer.status_code == 400 and "timesteps" in message_of(answer), path
        assert images.reads(path, {"prompt": "a", "timesteps": [999.0, 5]})[0].timesteps == [999, 5]


def test_jobs_that_can_never_run_are_refused_when_they_are_sent(images):
    """In every dialect, under the names of its fields."""
    for path, fields, named in (
        ("/v1/jobs", {}, "prompt"),
        ("/generate", {}, "prompt"),
        ("/v1/images/generations", {}, "prompt"),
        ("/v1/jobs", {"prompt": "a", "mask_image": IMAGE}, "mask_image"),
        ("/v1/images/generations", {"prompt": "a", "mask_image": IMAGE}, "mask_image"),
        ("/v1/jobs", {"prompt": "a", "sigmas": [0.0, 1.0]}, "sigmas"),
        ("/v1/jobs", {"prompt": "a", "timesteps": [1, 5]}, "timesteps"),
        ("/v1/jobs", {"prompt": "a", "scheduler": "ddim", "sigmas": [1.0, 0.0]}, "sigmas"),
        ("/generate", {"positive": "a", "steps": 2, "sigmas": [0.0, 1.0]}, "sigmas"),
    ):
        answer = images.post(path, fields)
        assert answer.status_code == 400 and named in message_of(answer), path
    with ReadingHost(type="wan_i2v") as host:
        for path in ("/v1/jobs", "/generate", "/v1/videos"):
            answer = host.post(path, {"prompt": "a"})
            assert answer.status_code == 400 and message_of(answer).startswith("image is missing")


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


OTHER = encode_file(sample_image(24))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/images/generations", {"steps": 2, "num_inference_steps": 3}),
        ("/v1/images/generations", {"guidance": "2", "guidance_scale": 3}),
        ("/v1/images/generations", {"size": "64x64", "width": 72}),
        ("/v1/images/generations", {"quality": "exact", "closeness": "fast"}),
        ("/v1/images/edits", {"image": IMAGE, "init_image": OTHER}),
        ("/v1/images/edits", {"image": IMAGE, "images": [OTHER]}),
        ("/v1/images/edits", {"mask": IMAGE, "mask_image": OTHER}),
        ("/v1/images/variations", {"image": IMAGE, "init_image": OTHER}),
        ("/v1/videos", {"seconds": 2, "num_frames": 2}),
        ("/v1/videos", {"input_reference": IMAGE, "image": OTHER}),
        *(
            ("/generate", {old: 0.25, field: 0.5})
            for field, names in compat.OLD_NAMES.items()
            for old in names
        ),
    ],
)
def test_one_thing_under_two_names_must_be_the_same(host, path, fields):
    one, other = fields
    answer = host.post(path, body(path, **fields))
    said = message_of(answer)
    assert answer.status_code == 400 and "contradict each other. Leave one of them out." in said
    assert said.startswith(f"{one}=") and f" and {other}=" in said


def test_one_thing_under_two_names_passes_where_it_is_the_same_or_nobody_cares(images):
    path = "/v1/images/generations"
    assert images.reads(path, {"prompt": "a", "steps": "2", "num_inference_steps": 2})
    assert images.reads(path, {"prompt": "a", "size": "64x64", "width": "64", "height": 64})
    loose = {"prompt": "a", "steps": 2, "num_inference_steps": 3, "size": "64x64", "width": 72}
    assert images.reads(path, {**loose, "strict": False})
    assert images.reads("/generate", {"positive": "a", "denoise": 1, "denoising_start": 0.5})


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations"])
def test_sampler_settings_without_effect_are_refused(images, path):
    asked = {"prompt": "a", "scheduler": {"scheduler": "ddim", "use_karras_sigmas": True}}
    answer = images.post(path, asked)
    assert answer.status_code == 400
    assert "use_karras_sigmas has no effect with ddim" in message_of(answer)
    assert images.reads(path, {**asked, "strict": False})


def test_empty_texts_among_images_are_none(images):
    for path, name in (
        ("/v1/images/edits", "image"),
        ("/v1/images/edits", "images"),
        ("/sdapi/v1/img2img", "init_images"),
    ):
        answer = images.post(path, {"prompt": "a", name: ["", None]})
        assert answer.status_code == 400 and "image" in message_of(answer), path
        (read,) = images.reads(path, {"prompt": "a", name: ["", IMAGE]})
        assert read.init_image is not None, path


@pytest.mark.parametrize("path", ["/v1/jobs", "/generate", "/v1/images/generations"])
def test_strength_without_what_it_is_of_is_refused(images, path):
    answer = images.post(path, {"prompt": "a", "strength": 0.5})
    assert answer.status_code == 400
    assert message_of(answer).startswith("strength=0.5 has no effect without an image")
    assert images.reads(path, {"prompt": "a", "strength": 1.0})
    with ReadingHost(type="flux2") as host:
        answer = host.post(path, {"prompt": "a", "strength": 0.5})
        assert answer.status_code == 422 and "starts from no image" in message_of(answer)


def test_two_images_of_a_field_that_has_one_are_refused(images):
    for path, fields in (
        ("/v1/jobs", {"init_image": [IMAGE, IMAGE]}),
        ("/generate", {"init_image": [IMAGE, IMAGE]}),
        ("/v1/images/edits", {"image": [IMAGE, IMAGE]}),
        ("/sdapi/v1/img2img", {"init_images": [IMAGE, IMAGE]}),
    ):
        answer = images.post(path, {"prompt": "a", **fields})
        assert answer.status_code in (400, 422) and "image" in message_of(answer), path


IMG = {"init_images": [IMAGE], "mask": IMAGE}


@pytest.mark.parametrize(
    ("path", "sent", "plain"),
    [
        ("/v1/images/generations", {"n": 2.0}, {"n": 2}),
        ("/v1/images/generations", {"n": "2.0"}, {"n": 2}),
        ("/v1/images/generations", {"size": "64X64"}, {"size": "64x64"}),
        ("/v1/images/generations", {"size": " 64 x 64 "}, {"size": "64x64"}),
        ("/v1/images/generations", {"size": "AUTO"}, {"size": "auto"}),
        ("/v1/images/generations", {"size": "64x64", "width": 64.0}, {"size": "64x64"}),
        ("/v1/images/generations", {"output_format": "jpg"}, {"output_format": "jpeg"}),
        ("/v1/images/generations", {"output_format": "PNG"}, {"output_format": "png"}),
        ("/v1/images/generations", {"response_format": "B64_JSON"},
         {"response_format": "b64_json"}),
        ("/v1/images/generations", {"quality": " HD "}, {"quality": "hd"}),
        ("/v1/images/generations", {"background": "Auto"}, {"background": "auto"}),
        ("/v1/images/generations", {"closeness": "Fast"}, {"closeness": "fast"}),
        ("/v1/images/generations", {"output_format": "WebP", "output_compression": 50.0},
         {"output_format": "webp", "output_compression": 50}),
        ("/v1/jobs", {"num_inference_steps": 3.0, "clip_skip": "1.0", "width": "64",
         "height": 64.0},
         {"num_inference_steps": 3, "clip_skip": 1, "width": 64, "height": 64}),
        ("/v1/jobs", {"quality": "EXACT"}, {"quality": "exact"}),
        ("/v1/jobs", {"scheduler": {"scheduler": "Euler", "timestep_spacing": "Trailing"}},
         {"scheduler": {"scheduler": "Euler", "timestep_spacing": "trailing"}}),
        ("/sdapi/v1/txt2img", {"n_iter": 2.0, "steps": "4.0"}, {"n_iter": 2, "steps": 4}),
        ("/sdapi/v1/txt2img", {"override_settings": {"CLIP_stop_at_last_layers": 2.0}},
         {"override_settings": {"CLIP_stop_at_last_layers": 2}}),
        ("/sdapi/v1/txt2img", {"override_settings": {"samples_format": "JPG"}},
         {"override_settings": {"samples_format": "jpeg"}}),
        ("/sdapi/v1/img2img", {**IMG, "mask_blur": 4.0, "inpaint_full_res": 1.0},
         {**IMG, "mask_blur": 4, "inpaint_full_res": True}),
    ],
)  # fmt: skip
def test_numbers_and_words_mean_the_same_however_they_are_written(host, path, sent, plain):
    before = {"prompt": "a", "seed": 1}
    one, other = (host.reads(path, {**before, **fields}) for fields in (sent, plain))
    texts = ("scheduler",)
    assert [each.model_dump(exclude={*texts, "init_image", "mask_image"}) for each in one] == [
        each.model_dump(exclude={*texts, "init_image", "mask_image"}) for each in other
    ]
    answers = [host.post(path, {**before, **fields}) for fields in (sent, plain)]
    kinds = [answer.get_data(as_text=True).count("/9j/") for answer in answers]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/images/generations", {"n": 2.5}),
        ("/v1/images/generations", {"n": True}),
        ("/v1/images/generations", {"size": "64*64"}),
        ("/v1/images/generations", {"output_format": "gif"}),
        ("/v1/jobs", {"num_inference_steps": 3.5}),
        ("/v1/jobs", {"width": "100.0"}),
        ("/v1/jobs", {"width": "101"}),
        ("/sdapi/v1/txt2img", {"n_iter": "two"}),
    ],
)
def test_numbers_and_words_of_another_kind_are_refused_as_they_were_sent(host, path, fields):
    answer = host.post(path, {"prompt": "a", **fields})
    ((name, value),) = fields.items()
    assert answer.status_code == 400
    assert f"{name}={value!r}" in message_of(answer) or f"{name}=10" in message_of(answer)


EMBEDS = npy(np.zeros((1, 4, 8), np.float32))


@pytest.mark.parametrize(
    "fields",
    [
        {"first_step": 1},
        {"negative_prompt_embeds": EMBEDS},
        {"pooled_prompt_embeds": EMBEDS},
        {"negative_pooled_prompt_embeds": EMBEDS},
    ],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations"])
def test_fields_without_the_one_that_they_belong_to_are_refused(images, path, fields):
    answer = images.post(path, {"prompt": "a", **fields})
    assert answer.status_code == 400
    assert message_of(answer).startswith(next(iter(fields)))
    assert "has no effect without" in message_of(answer)
    assert images.reads(path, {"prompt": "a", "first_step": 0})
