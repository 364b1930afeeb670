"""Requests as published programs send them, with all that they add of their own, and the lists that
they read before.
"""

import base64
import io
import json

import pytest
from PIL import Image

from tests.checkpoints import sample_image
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost, message_of

IMAGE = encode_file(sample_image(16))
TXT, IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
WANTED = {
    "prompt": "a", "negative_prompt": "b", "seed": 5, "num_inference_steps": 4, "width": 64,
    "guidance_scale": 7, "height": 64, "scheduler": {"scheduler": "euler_a"},
}  # fmt: skip
PLAIN = {"prompt": "a", "negative_prompt": "b", "seed": 5, "steps": 4, "cfg_scale": 7, "width": 64,
    "height": 64}  # fmt: skip
SILLY_TAVERN = {
    **PLAIN, "url": "http://127.0.0.1:6000", "auth": "me:secret", "sampler_name": "Euler a",
    "scheduler": "normal", "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent",
    "hr_scale": 2, "denoising_strength": 0.7, "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True,
    "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip
PHOTOSHOP = {
    **PLAIN, "seed": "5", "selection_info": {"left": 0, "top": 0}, "alwayson_scripts": {},
    "original_prompt": "a", "original_negative_prompt": "b", "clip_skip": 1,
    "sampler_index": "Euler a", "denoising_strength": 0.7, "batch_size": 1, "mask_blur": 4,
    "use_sharp_mask": False, "use_prompt_shortcut": True, "prompt_shortcut_ui_dict": {"a": "b"},
    "uniqueDocumentId": "x-1", "mode": "txt2img", "restore_faces": False, "tiling": False,
}  # fmt: skip
"""Of the Auto-Photoshop plugin."""
AIYABOT = {
    **PLAIN, "sampler_index": "Euler a", "seed_resize_from_h": -1, "seed_resize_from_w": -1,
    "denoising_strength": None, "n_iter": 1, "batch_size": 1, "styles": ["None"],
    "override_settings": {"CLIP_stop_at_last_layers": 1},
}  # fmt: skip
NPM = {
    **PLAIN, "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0,
    "hr_resize_x": 0, "hr_resize_y": 0, "denoising_strength": 0.7, "firstphase_width": 0,
    "firstphase_height": 0, "styles": [], "subseed": -1, "subseed_strength": 0,
    "seed_resize_from_h": 0, "seed_resize_from_w": 0, "eta": 1, "s_churn": 0, "s_tmax": 0,
    "s_tmin": 0, "s_noise": 1, "override_settings": {}, "script_args": [], "script_name": None,
    "sampler_name": "Euler a", "alwayson_scripts": {}, "use_deprecated_controlnet": False,
}  # fmt: skip
"""Of the package stable-diffusion-api."""
KOBOLD = {
    **PLAIN, "sampler_name": "Euler a", "batch_size": 1, "n_iter": 1, "do_not_save_samples": True,
    "do_not_save_grid": True, "enable_hr": False, "eta": 0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0,
    "s_noise": 1, "override_settings": {
        "sd_model_checkpoint": "sdxl", "eta_noise_seed_delta": 0.0, "ddim_discretize": "uniform",
        "CLIP_stop_at_last_layers": 1.0, "img2img_fix_steps": False, "sd_hypernetwork": "None",
        "inpainting_mask_weight": 1.0, "initial_noise_multiplier": 1.0,
        "comma_padding_backtrack": 20.0, "forge_additional_modules": [],
    },
}  # fmt: skip
"""Of KoboldAI Lite."""
BLENDER = {
    **PLAIN, "image_similarity": 0.4, "denoising_strength": 0.6, "sampler": "Euler a",
    "sampler_index": "Euler a", "init_images": ["data:image/png;base64," + IMAGE],
}  # fmt: skip
"""Of AI Render."""
UNIT = {
    "input_image": IMAGE, "module": "none", "model": "None", "weight": 1, "lowvram": False,
    "resize_mode": "Scale to Fit (Inner Fit)", "processor_res": 64, "threshold_a": 64,
    "threshold_b": 64, "guidance": 1, "guidance_start": 0, "guidance_end": 1, "guessmode": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def host():
    with ReadingHost() as running:
        yield running


@pytest.fixture(scope="module")
def controlled():
    with ReadingHost(control_net='{"/c/canny": 1.0, "/c/depth.safetensors": 1.0}') as running:
        yield running


@pytest.mark.parametrize(
    "sent",
    [SILLY_TAVERN, AIYABOT, NPM, PHOTOSHOP, KOBOLD],
    ids=["silly", "aiyabot", "npm", "photoshop", "kobold"],
)
def test_txt2img_of_published_programs_is_read(host, sent):
    assert host.is_same(TXT, sent, WANTED)


def test_one_body_may_go_to_both_calls(host):
    """As that of sd-backend-client, with its defaults."""
    body = {**PLAIN, "sampler_name": "Euler a", "scheduler": "Normal", "inpainting_fill": 1,
        "mask_blur_x": 4, "inpaint_full_res": True, "resize_mode": 2, "init_images": [], "mask": "",
        "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "firstphase_width": 0,
        "n_iter": 1, "batch_size": 1, "restore_faces": False, "tiling": False}  # fmt: skip
    assert host.is_same(TXT, body, WANTED)
    found = host.reads(IMG, {**body, "resize_mode": 0, "init_images": [IMAGE]})[0]
    assert (found.init_image is not None, found.seed) == (True, 5)
    for path, wrong, said in (
        (TXT, {"init_images": [IMAGE]}, "send it to /sdapi/v1/img2img"),
        (IMG, {"init_images": [IMAGE], "enable_hr": True}, "only txt2img has a second pass"),
    ):
        answer = host.post(path, {"prompt": "a", **wrong})
        assert answer.status_code == 422 and said in message_of(answer)


def test_info_has_the_types_that_programs_require(host):
    info = json.loads(host.post(TXT, {"prompt": "a"}).get_json()["info"])
    texts = ("sd_model_name", "sd_model_hash", "sampler_name", "job_timestamp", "version")
    assert all(isinstance(info[name], str) for name in texts)
    assert isinstance(info["extra_generation_params"], dict)


def test_img2img_of_the_photoshop_plugin_is_read(host):
    more = {"mode": "inpaint", "inpaint_full_res": False, "inpaint_full_res_padding": 0,
        "inpainting_fill": 1, "mask_expansion": 0, "mask": IMAGE, "expanded_mask": IMAGE,
        "init_images": [IMAGE], "image_cfg_scale": 1.5}  # fmt: skip
    assert host.reads(IMG, {**PHOTOSHOP, **more})[0].mask_image is not None


def test_img2img_of_ai_render_is_read(host, controlled):
    wanted = {**WANTED, "init_image": IMAGE, "strength": 0.6}
    assert host.is_same(IMG, BLENDER, wanted)
    units = [{"weight": 0.9, "module": "none", "model": name} for name in ("canny", "depth")]
    more = {"alwayson_scripts": {"controlnet": {"args": units}}}
    found = controlled.reads(IMG, {**BLENDER, **more})[0]
    assert [each.size for each in found.control_image] == [(16, 16)] * 2
    plain = {name: value for name, value in BLENDER.items() if name != "init_images"}
    answer = controlled.post(TXT, {**plain, **more})
    assert answer.status_code == 400 and "unit 0 has no image" in message_of(answer)


def test_a_sampler_acts_by_each_of_its_names(host):
    for name in ("sampler_name", "sampler_index", "sampler"):
        found = host.reads(TXT, {"prompt": "a", name: "Euler a"})[0]
        assert found.scheduler["scheduler"] == "euler_a"


def test_a_script_that_is_switched_off_asks_for_nothing(host):
    for args, status in (([False, {"ad_model": "x"}], 200), ([True, {"ad_model": "x"}], 422)):
        scripts = {"ADetailer": {"args": args}}
        assert host.post(TXT, {"prompt": "a", "alwayson_scripts": scripts}).status_code == status


def test_loras_in_a_list_as_for_stable_diffusion_cpp(tmp_path):
    (tmp_path / "ink.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with ReadingHost(lora_dir=str(tmp_path)) as host:
        wanted = {"prompt": "a", "seed": 1, "lora": {"ink.safetensors": 0.5}}
        sent = {**wanted, "lora": [{"path": "ink.safetensors", "multiplier": 0.5}]}
        assert host.is_same(TXT, sent, wanted)
        for wrong in ([{"path": "ink.safetensors", "is_high_noise": True}], ["ink"], [{}]):
            assert host.post(TXT, {**wanted, "lora": wrong}).status_code == 400


def test_passwords_that_programs_send_along_are_not_repeated(host):
    answer = host.post(TXT, SILLY_TAVERN)
    assert answer.status_code == 200 and b"secret" not in answer.data
    assert "auth" not in answer.get_json()["parameters"]


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ({"clip_skip": 2}, {"clip_skip": 1}),
        ({"clip_skip": 2, "override_settings": {"CLIP_stop_at_last_layers": 2}}, {"clip_skip": 1}),
        ({"clip_skip": -1}, {}),
        ({"clip_skip": 0, "override_settings": {"CLIP_stop_at_last_layers": 1}}, {}),
    ],
)
def test_clip_skip_acts_under_either_of_its_names(host, sent, wanted):
    assert host.is_same(
        TXT, {"prompt": "a", "seed": 1, **sent}, {"prompt": "a", "seed": 1} | wanted
    )


def test_clip_skips_that_contradict_each_other_are_refused(host):
    both = {"clip_skip": 3, "override_settings": {"CLIP_stop_at_last_layers": 2}}
    answer = host.post(TXT, {"prompt": "a", **both})
    assert answer.status_code == 400 and "contradict each other" in message_of(answer)


def test_styles_that_are_none_ask_for_nothing_and_others_are_refused(host):
    assert host.post(TXT, {"prompt": "a", "styles": ["anime"]}).status_code == 422


def test_units_beside_alwayson_scripts_act(controlled):
    script = {"alwayson_scripts": {"controlnet": {"args": [UNIT, UNIT]}}}
    for sent in ({"controlnet_units": [UNIT, UNIT]}, script, {**script, "controlnet_units": [1]}):
        found = controlled.reads(TXT, {"prompt": "a", "seed": 1, **sent})[0]
        assert len(found.control_image) == 2, sent


def test_units_go_to_the_controlnets_that_they_name(controlled):
    other = encode_file(Image.new("RGB", (16, 16), "red"))
    units = [{"image": other, "model": "depth"}, {"image": IMAGE, "model": "canny"}]
    wanted = {"control_image": [IMAGE, other], "controlnet_conditioning_scale": [1, 1]}
    sent = {"prompt": "a", "seed": 1, "alwayson_scripts": {"controlnet": {"args": units}}}
    found, asked = (
        controlled.reads(path, body)[0]
        for path, body in ((TXT, sent), ("/v1/jobs", {"prompt": "a", "seed": 1, **wanted}))
    )
    assert [each.tobytes() for each in found.control_image] == [
        each.tobytes() for each in asked.control_image
    ]


def test_lists_of_the_controlnet_extension(host, controlled):
    def get(where, name):
        return where.client.get(f"/controlnet/{name}").get_json()

    assert get(controlled, "model_list") == {"model_list": ["None", "canny", "depth"]}
    missing = host.client.get("/controlnet/version")
    assert missing.status_code == 404 and "--control_net" in message_of(missing)
    assert get(controlled, "module_list?alias_names=true")["module_list"] == ["none"]
    assert get(controlled, "settings") == {"control_net_unit_count": 2}
    assert get(controlled, "version")["version"] > 1
    every = get(controlled, "control_types")["control_types"]["All"]
    assert (every["default_option"], every["default_model"]) == ("none", "canny")
    answer = controlled.post("/controlnet/detect", {"controlnet_module": "canny"})
    assert answer.status_code == 422 and "Send the map itself" in message_of(answer)
    assert "detail" in controlled.client.get("/controlnet/nothing").get_json()


def test_progress_has_the_fields_of_a1111s_state(host):
    state = host.client.get("/sdapi/v1/progress").get_json()["state"]
    assert set(state) >= {
        "skipped", "interrupted", "stopping_generation", "job", "job_count", "job_timestamp",
        "job_no", "sampling_step", "sampling_steps",
    }  # fmt: skip


def test_images_are_enlarged_in_a_batch(host):
    files = [{"data": IMAGE, "name": "one"}, {"data": encode_file(sample_image(8)), "name": "two"}]
    body = {"imageList": files, "upscaler_1": "Nearest", "upscaling_resize": 2, "resize_mode": 0,
        "codeformer_visibility": 0, "upscaler_2": "None"}  # fmt: skip
    images = host.post("/sdapi/v1/extra-batch-images", body).get_json()["images"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images]
    assert sizes == [(32, 32), (16, 16)]
    for wrong, said in (
        ([], "imageList=[]"),
        (["x"], "imageList has 'x'"),
        ([{"data": ""}], "imageList is missing"),
        ([{"image": IMAGE}], "image is not a field"),
        ([{"data": IMAGE}] * 100, "imageList="),
    ):
        answer = host.post("/sdapi/v1/extra-batch-images", {"imageList": wrong})
        assert answer.status_code == 400 and message_of(answer).startswith(said)


def size_of(data):
    return Image.open(io.BytesIO(data)).size


def images_of(answer):
    assert answer.status_code == 200, answer.get_data(as_text=True)
    return answer.get_json()["data"]


def test_images_without_a_format_are_there_in_both(host):
    form = {"prompt": "a", "image": (io.BytesIO(base64.b64decode(IMAGE)), "a.png")}
    for made in (
        images_of(host.post(GENERATE, {"prompt": "a", "model": "gpt-image-2"}))[0],
        images_of(host.client.post(EDIT, data=form))[0],
    ):
        linked = host.client.get(made["url"].removeprefix("http://localhost"))
        assert size_of(linked.data) == size_of(base64.b64decode(made["b64_json"])) == (24, 16)
    for form in ("url", "b64_json"):
        made = images_of(host.post(GENERATE, {"prompt": "a", "response_format": form}))[0]
        assert set(made) == {form, "seed"}


def test_input_fidelity_keeps_more_of_an_image_to_start_from():
    body = {"prompt": "a", "seed": 1, "image": IMAGE, "input_fidelity": "high"}
    wanted = {"prompt": "a", "seed": 1, "init_image": IMAGE}
    with ReadingHost() as host:
        assert host.is_same(EDIT, body, {**wanted, "strength": 0.5})
        assert host.is_same(EDIT, {**body, "strength": 0.3}, {**wanted, "strength": 0.3})
        assert host.is_same(EDIT, {**body, "input_fidelity": "low"}, wanted)
        answer = host.post(EDIT, {**body, "input_fidelity": "most"})
        assert answer.status_code == 400 and "Allowed: low, high." in message_of(answer)
    with ReadingHost(type="flux_kontext") as host:  # it edits images: none is where it starts
        assert host.is_same(EDIT, body, {"prompt": "a", "seed": 1, "image": IMAGE})
