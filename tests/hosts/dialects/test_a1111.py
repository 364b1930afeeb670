"""A1111's txt2img and img2img: what each field asks of a host, and what its answers tell."""

import base64
import io
import json
import re
import struct

import numpy as np
import pytest
from PIL import Image

from backends.model_table import read_table
from tests.checkpoints import sample_image
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost, message_of

IMAGE = encode_file(sample_image(16))
TXT, IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"


def lora_file(path, name=""):
    header = json.dumps({"__metadata__": {"ss_output_name": name}} if name else {}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    lora_file(folder / "style.safetensors")
    lora_file(folder / "epoch-000004.safetensors", "Ink Drawing")
    (folder / "sub").mkdir()
    lora_file(folder / "sub" / "deep.v1.safetensors")
    return folder


@pytest.fixture(scope="module")
def host(lora_folder):
    with ReadingHost(lora_dir=str(lora_folder)) as running:
        yield running


@pytest.fixture(scope="module")
def controlled():
    with ReadingHost(control_net="/c") as running:
        yield running


@pytest.mark.parametrize(
    ("prompt", "plain", "loras"),
    [
        ("a red car <lora:style:0.8>", "a red car", {"style.safetensors": 0.8}),
        ("a <lora:style> red car", "a red car", {"style.safetensors": 1}),
        ("<lora:style.safetensors:1>a", "a", {"style.safetensors": 1}),
        ("a <lora:Ink Drawing:-.5>", "a", {"epoch-000004.safetensors": -0.5}),
        ("a <lora:deep.v1:1>", "a", {"sub/deep.v1.safetensors": 1}),
        ("a <lora:sub/deep.v1:1>", "a", {"sub/deep.v1.safetensors": 1}),
        ("a <lora:style:te=0.5:unet=0.5>", "a", {"style.safetensors": 0.5}),
        ("a <lyco:style:1> <lora:deep.v1:2>", "a",
         {"style.safetensors": 1, "sub/deep.v1.safetensors": 2}),
    ],
)  # fmt: skip
def test_lora_tags_are_taken_out_and_used(host, prompt, plain, loras):
    wanted = {"prompt": plain, "seed": 1, "lora": loras}
    assert host.is_same(TXT, {"prompt": prompt, "seed": 1}, wanted)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        (
            {"prompt": "a <lora:nothing:1>"},
            400,
            "names the LoRA 'nothing', which does not exist here",
        ),
        ({"prompt": "a <lora:style:strong>"}, 400, "whose weight is not a number"),
        ({"prompt": "a <lora:style:1:2>"}, 422, "one weight for all parts"),
        ({"prompt": "a <hypernet:style:1>"}, 422, "hypernet:'style' is not available"),
        ({"prompt": "a", "negative_prompt": "<lora:style:1>"}, 400, "negative_prompt has a LoRA"),
    ],
)
def test_tags_that_cannot_be_used_are_refused(host, fields, status, said):
    answer = host.post(TXT, {"seed": 1, **fields})
    assert answer.status_code == status and said in message_of(answer)


def test_tags_are_dropped_where_the_client_says_so(host):
    body = {"prompt": "a <lora:style:1>", "seed": 1, "disable_extra_networks": True}
    assert host.is_same(TXT, body, {"prompt": "a", "seed": 1})


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("text", ["(red:1.3)", "((red))", "[red]", "a BREAK b", "\\("])
def test_emphasis_is_read_by_the_rules_of_a1111(host, name, text):
    body = {"prompt": "a", name: text, "seed": 1}
    assert host.is_same(TXT, body, {**body, "prompt_syntax": "a1111"})
    info = json.loads(host.post(TXT, body).get_json()["info"])
    assert info[name] == text and not info["notes"]


def test_plain_prompts_are_left_to_the_pipeline_and_long_ones_are_read_to_their_end(host):
    for prompt in ("a red car", "a: b, c", ""):
        assert host.reads(TXT, {"prompt": prompt})[0].prompt_syntax is None
    assert host.reads(TXT, {"prompt": "a red car, " * 30})[0].prompt_syntax == "a1111"
    with ReadingHost(compel=True) as compel:
        assert compel.reads(TXT, {"prompt": "a red car"})[0].prompt_syntax == "a1111"
        assert compel.reads("/v1/jobs", {"prompt": "(red)1.2"})[0].prompt_syntax is None


@pytest.mark.parametrize("prompt", ["a AND b", "[a:b:0.5]", "[a|b]"])
def test_prompts_that_change_between_steps_are_refused_unless_the_client_says_so(host, prompt):
    answer = host.post(TXT, {"prompt": prompt})
    assert answer.status_code == 422 and message_of(answer).startswith("prompt has '")
    lenient = {"prompt": prompt, "strict": False}
    assert host.reads(TXT, lenient)[0].prompt_syntax is None
    notes = json.loads(host.post(TXT, lenient).get_json()["info"])["notes"]
    assert "plain text" in notes[0]


@pytest.mark.parametrize("prompt", ["(red:1.3)", "a BREAK b", "a AND b", "[a:b:0.5]"])
def test_emphasis_is_told_to_be_plain_text_for_models_without_it(prompt, caplog):
    with ReadingHost(type="sd3") as other:
        info = json.loads(other.post(TXT, {"prompt": prompt}).get_json()["info"])
        assert "plain text" in info["notes"][0] and "plain text" in caplog.text
        assert not json.loads(other.post(TXT, {"prompt": "a car"}).get_json()["info"])["notes"]
        answer = other.post("/v1/jobs", {"prompt": prompt, "prompt_syntax": "a1111"})
        assert answer.status_code == 422 and message_of(answer).startswith("prompt_syntax is not")


@pytest.mark.parametrize("path", [TXT, "/v1/jobs"])
def test_weights_beyond_reason_are_the_clients_mistake(host, path):
    body = {"prompt": "a", "negative_prompt": "(a:1000)"}
    answer = host.post(path, body if path == TXT else {**body, "prompt_syntax": "a1111"})
    assert answer.status_code == 400 and message_of(answer).startswith("negative_prompt has the")


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (("DPM++ 2M", "Exponential"), {"scheduler": "dpmpp_2m", "use_exponential_sigmas": True}),
        (("DPM++ 2M", "Beta"), {"scheduler": "dpmpp_2m", "use_beta_sigmas": True}),
        (("DPM++ 2M", "SGM Uniform"), {"scheduler": "dpmpp_2m", "timestep_spacing": "trailing"}),
        (("DPM++ 2M", "sgm_uniform"), {"scheduler": "dpmpp_2m", "timestep_spacing": "trailing"}),
        (("DPM++ 2M", "Karras"), {"scheduler": "dpmpp_2m", "use_karras_sigmas": True}),
        (("DPM++ 2M Karras", ""), {"scheduler": "dpmpp_2m", "use_karras_sigmas": True}),
        (("DPM++ 2M SDE Exponential", None),
         {"scheduler": "dpmpp_2m_sde", "use_exponential_sigmas": True}),
        (("DPM++ 2M SGMUniform", "automatic"),
         {"scheduler": "dpmpp_2m", "timestep_spacing": "trailing"}),
        (("Euler a", "Automatic"), {"scheduler": "euler_a"}),
        (("Euler a", "normal"), {"scheduler": "euler_a"}),
        (("euler_a", "Simple"), {"scheduler": "euler_a"}),
        (("PLMS", "Uniform"), {"scheduler": "pndm"}),
        (("", "Karras"), {"use_karras_sigmas": True}),
        ((None, "Automatic"), None),
    ],
)  # fmt: skip
def test_samplers_and_schedules_are_read(host, sent, wanted):
    body = {"prompt": "a", "seed": 1, "sampler_name": sent[0], "scheduler": sent[1]}
    ours = {"prompt": "a", "seed": 1, **({"scheduler": wanted} if wanted else {})}
    assert host.is_same(TXT, body, ours)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"scheduler": "xyz"}, 400, "scheduler='xyz' is not a schedule here"),
        ({"scheduler": "Align Your Steps"}, 400, "scheduler='Align Your Steps'"),
        ({"scheduler": "KL Optimal"}, 400, "scheduler='KL Optimal'"),
        ({"scheduler": ["Karras"]}, 400, "scheduler=['Karras']"),
        ({"sampler_name": "DPM++ 2N"}, 400, "The nearest one is DPM++ 2M"),
        ({"sampler_name": 5}, 400, "sampler_name=5 is not a name"),
        ({"sampler_index": 0}, 400, "sampler_index=0 is not a name"),
        ({"sampler_name": "Euler a", "scheduler": "Karras"}, 422, "not available with Euler a"),
        ({"sampler_name": "DPM++ SDE", "scheduler": "SGM Uniform"}, 422, "with DPM++ SDE"),
    ],
)
def test_samplers_and_schedules_that_are_not_here_are_refused(host, fields, status, said):
    answer = host.post(TXT, {"prompt": "a", **fields})
    assert answer.status_code == status and said in message_of(answer)


HIRES = {"enable_hr": True, "denoising_strength": 0.5}
KREA2 = "Krea2Pipeline gives mu and sigmas of its own to the sampler"
BRIA = "BriaPipeline gives sigmas of its own to the sampler"


@pytest.mark.parametrize(
    ("model", "path", "fields", "said"),
    [
        ("krea2", TXT, {"sampler_name": "Heun"}, f"sampler_name='Heun' cannot .*{KREA2}.*Allowed: "
         "Euler, UniPC, LCM."),
        ("krea2", TXT, {"sampler_index": "DPM++ 2M Karras"}, "sampler_index='DPM.. 2M Karras' .*: "
         "Euler, UniPC, LCM."),
        ("krea2", "/v1/jobs", {"scheduler": "heun"}, f"scheduler='heun' cannot .*{KREA2}.*: euler, "
         "lcm, unipc, fm_euler, fm_lcm."),
        ("krea2", "/v1/jobs", {"scheduler": "dpmpp_2m", "strict": False}, "scheduler='dpmpp_2m' c"),
        ("bria", TXT, {"sampler_name": "Heun"}, f"sampler_name='Heun' cannot .*{BRIA}.*: Euler, "
         "UniPC."),
        ("bria", "/v1/jobs", {"scheduler": "heun"}, f"scheduler='heun' cannot .*{BRIA}.*: euler, "
         "unipc, fm_euler."),
        ("bria", TXT, {"sampler_name": "LCM"}, "FlowMatchLCMScheduler has no scale_model_input"),
        ("flux", TXT, {"sampler_name": "DDIM"}, "sampler_name='DDIM' cannot sample a flow-matching "
         "model. Allowed: DPM.. 2M, .*UniPC"),
        ("flux", TXT, {"sampler_name": "DPM++ 2M", "scheduler": "Karras"}, "'Karras' is not avail"),
        ("sdxl", TXT, {"hr_sampler_name": "Hein", **HIRES}, "hr_sampler_name='Hein' is not a samp"),
        ("sdxl", TXT, {"hr_sampler_name": "DDIM", "hr_scheduler": "Karras", **HIRES},
         "hr_scheduler='Karras' is not available with DDIM"),
        ("sdxl", TXT, {"sampler_name": "DDIM Karras"}, "sampler_name='DDIM Karras' is not avail"),
    ],
)  # fmt: skip
def test_samplers_that_the_model_cannot_use_are_refused_before_they_are_queued(
    model, path, fields, said
):
    with ReadingHost(type=model) as host:
        answer = host.post(path, {"prompt": "a", **fields})
        assert answer.status_code in (400, 422) and re.search(said, message_of(answer))
        assert not host.requests


def test_samplers_are_listed_that_the_model_can_use():
    with ReadingHost(type="krea2") as host:
        found = [each["name"] for each in host.client.get("/sdapi/v1/samplers").json]
    assert found == ["Euler", "UniPC", "LCM"]


def test_clip_layers_count_from_one(host):
    for layers, skip in ((1, {}), (2, {"clip_skip": 1}), ("3", {"clip_skip": 2})):
        body = {"prompt": "a", "seed": 1, "override_settings": {"CLIP_stop_at_last_layers": layers}}
        assert host.is_same(TXT, body, {"prompt": "a", "seed": 1, **skip})


@pytest.mark.parametrize(
    ("overrides", "status", "said"),
    [
        ({"sd_model_checkpoint": "other"}, 422, "sd_model_checkpoint='other' is not loaded"),
        ({"sd_model_checkpoint": "sdxl"}, 200, ""),
        ({"sd_vae": "x.safetensors"}, 422, "sd_vae="),
        ({"sd_vae": "Automatic"}, 200, ""),
        ({"eta_noise_seed_delta": 31337}, 422, "eta_noise_seed_delta=31337"),
        ({"CLIP_stop_at_last_layer": 2}, 400, "The nearest one is CLIP_stop_at_last_layers"),
        ({"samples_format": "tiff"}, 400, "samples_format='tiff' is not allowed"),
        ([1], 400, "override_settings=[1] is not allowed"),
        ({}, 200, ""),
    ],
)
def test_override_settings_are_done_or_refused(host, overrides, status, said):
    answer = host.post(TXT, {"prompt": "a", "override_settings": overrides})
    assert answer.status_code == status and (not said or said in message_of(answer))


def test_format_of_the_answer_may_be_chosen(host):
    body = {"prompt": "a", "override_settings": {"samples_format": "jpg"}}
    data = host.post(TXT, body).get_json()["images"][0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "JPEG"


@pytest.mark.parametrize("name", ["controlnet", "ControlNet"])
def test_controlnet_units_become_control_images(host, controlled, name):
    unit = {"enabled": True, "image": IMAGE, "weight": 0.5, "guidance_end": 0.8, "module": "none",
        "model": "canny [abc]", "control_mode": "Balanced", "pixel_perfect": True}  # fmt: skip
    body = {"prompt": "a", "seed": 1, "alwayson_scripts": {name: {"args": [unit]}}}
    wanted = {"prompt": "a", "seed": 1, "control_image": [IMAGE],
        "controlnet_conditioning_scale": 0.5, "control_guidance_start": 0.0,
        "control_guidance_end": 0.8}  # fmt: skip
    assert controlled.is_same(TXT, body, wanted)
    answer = host.post(TXT, body)
    assert answer.status_code == 422 and "no ControlNet is loaded" in message_of(answer)
    off = {"prompt": "a", "seed": 1, "alwayson_scripts": {name: {"args": [{"enabled": False}]}}}
    assert host.is_same(TXT, off, {"prompt": "a", "seed": 1})
    unit["module"] = "canny"
    assert "module='canny' is not available" in message_of(controlled.post(TXT, body))


def test_other_scripts_are_refused_unless_they_are_empty(host):
    for scripts, status in (
        ({"ADetailer": {"args": [{"ad_model": "face.pt"}]}}, 422),
        ({"Refiner": {"args": [True]}}, 422),
        ({"ADetailer": {"args": [False]}, "ControlNet": {"args": []}}, 200),
        ({"ADetailer": {"args": []}}, 200),
        ({}, 200),
    ):
        answer = host.post(TXT, {"prompt": "a", "alwayson_scripts": scripts})
        assert answer.status_code == status, scripts


@pytest.mark.parametrize("value", [False, "false", "False", "0", 0, "", None])
@pytest.mark.parametrize("name", ["enable_hr", "restore_faces", "tiling"])
def test_switches_may_be_off_as_text(host, name, value):
    assert host.post(TXT, {"prompt": "a", name: value}).status_code == 200
    on = host.post(TXT, {"prompt": "a", name: "true"}).status_code
    assert on == (200 if name == "enable_hr" else 422)


def mask_of(image):
    return np.asarray(image.convert("L")) >= 128


def halves(mode="L", *, left, right):
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return encode_file(image)


AS_IT_IS = {"mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 1}
"""Fields that let a mask and its image be used as they are."""
RIGHT = np.arange(16)[None, :].repeat(16, 0) >= 8


@pytest.mark.parametrize("inverted", [False, "false", "0", 0, None])
def test_masks_are_inverted_only_where_that_is_asked(host, inverted):
    body = {"prompt": "a", "init_images": [IMAGE], **AS_IT_IS}
    body["mask"] = halves(left=0, right=255)
    found = host.reads(IMG, {**body, "inpainting_mask_invert": inverted})[0]
    assert (mask_of(found.mask_image) == RIGHT).all()
    for yes in (True, 1, "1", "true"):
        found = host.reads(IMG, {**body, "inpainting_mask_invert": yes})[0]
        assert (mask_of(found.mask_image) != RIGHT).all()
    assert host.post(IMG, {**body, "inpainting_mask_invert": "maybe"}).status_code == 400


@pytest.mark.parametrize("colour", ["white", "black", "red"])
def test_alpha_of_a_mask_says_what_changes(host, colour):
    clear = (*Image.new("RGB", (1, 1), colour).getpixel((0, 0)), 0)
    mask = halves("RGBA", left=clear, right=(*clear[:3], 255))
    found = host.reads(IMG, {"prompt": "a", "init_images": [IMAGE], "mask": mask, **AS_IT_IS})[0]
    assert (mask_of(found.mask_image) == RIGHT).all()
    for path in ("/v1/jobs", "/generate"):
        sent = {"prompt": "a", "init_image": IMAGE, "mask_image": mask}
        assert (mask_of(host.reads(path, sent)[0].mask_image) == RIGHT).all()
    edit = {"prompt": "a", "image": IMAGE, "mask": mask}
    assert (mask_of(host.reads("/v1/images/edits", edit)[0].mask_image) != RIGHT).all()


def test_mask_whose_alpha_is_full_is_read_by_its_colours(host):
    mask = halves("RGBA", left=(0, 0, 0, 255), right=(255, 255, 255, 255))
    sent = {"prompt": "a", "init_image": IMAGE, "mask_image": mask}
    assert (mask_of(host.reads("/v1/jobs", sent)[0].mask_image) == RIGHT).all()


def grey16(grey8):
    return encode_file(Image.fromarray(np.asarray(grey8).astype("uint16") * 257))


def test_sixteen_bits_of_grey_are_the_same_image_as_eight(host, controlled):
    grey = sample_image(16).convert("L")
    eight, sixteen = encode_file(grey), grey16(grey)
    for where, path, name in (
        (controlled, "/v1/jobs", "control_image"),
        (controlled, "/generate", "control_image"),
        (host, "/v1/jobs", "init_image"),
        (host, "/v1/jobs", "mask_image"),
        (host, "/v1/images/edits", "image"),
        (host, "/v1/images/edits", "mask"),
    ):
        needed = {"init_image": IMAGE} if name == "mask_image" else {}
        needed = {"image": IMAGE} if name == "mask" else needed
        one, other = (
            where.reads(path, {"prompt": "a", "seed": 1, **needed, name: data})[0]
            for data in (eight, sixteen)
        )
        field = {"image": "init_image", "mask": "mask_image"}.get(name, name)
        assert np.array_equal(*(np.asarray(getattr(each, field)) for each in (one, other))), path
        assert np.asarray(getattr(other, field)).std() > 0


def test_jpeg_may_have_a_video_behind_it(host):
    buffer = io.BytesIO()
    sample_image(16).save(buffer, format="JPEG", progressive=True)
    video = np.random.default_rng(0).integers(0, 256, 4_000_000, dtype=np.uint8).tobytes()
    data = base64.b64encode(buffer.getvalue() + video).decode()
    assert host.post("/v1/jobs", {"prompt": "a", "init_image": data}).status_code == 202


def test_masks_are_read_within_the_hosts_limits(host):
    huge = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(huge, format="PNG")
    data = base64.b64encode(huge.getvalue()).decode()
    for path, body in (
        (IMG, {"init_images": [IMAGE], "mask": data, "inpainting_mask_invert": 1}),
        ("/v1/images/edits", {"image": IMAGE, "mask": data}),
        ("/v1/jobs", {"init_image": IMAGE, "mask_image": data}),
    ):
        answer = host.post(path, {"prompt": "a", **body})
        assert answer.status_code == 400 and "more than 25000000 pixels" in message_of(answer)
    for broken in (data[:400], base64.b64encode(huge.getvalue()[:-30] + b"x" * 30).decode()):
        body = {"prompt": "a", "image": IMAGE, "mask": broken}
        assert host.post("/v1/images/edits", body).status_code == 400


def test_answers_have_what_clients_read(host):
    body = {"prompt": "a red, car", "negative_prompt": "fog", "seed": 5, "n_iter": 2, "steps": 4,
        "sampler_name": "DPM++ 2M", "scheduler": "Karras", "cfg_scale": 5}  # fmt: skip
    answer = host.post(TXT, body).get_json()
    info = json.loads(answer["info"])
    assert (info["all_seeds"], info["all_prompts"]) == ([5, 6], ["a red, car"] * 2)
    assert info["all_negative_prompts"] == ["fog"] * 2 and info["negative_prompt"] == "fog"
    assert (info["sampler_name"], info["steps"], info["cfg_scale"]) == ("DPM++ 2M", 4, 5.0)
    assert (info["subseed"], info["batch_size"], info["index_of_first_image"]) == (-1, 1, 0)
    text = Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).text["parameters"]
    assert text == info["infotexts"][0]
    lines = text.split("\n")
    assert lines[:2] == ["a red, car", "Negative prompt: fog"]
    assert lines[2].startswith(
        "Steps: 4, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: 5, Size: 24x16"
    )
    assert host.post(TXT, {**body, "send_images": False}).get_json()["images"] == []


@pytest.mark.parametrize(
    "name",
    "schedulers upscalers latent-upscale-modes embeddings sd-vae cmd-flags memory scripts "
    "hypernetworks loras samplers options".split(),
)
def test_lists_that_clients_ask_for_are_there(host, name):
    assert host.client.get(f"/sdapi/v1/{name}").status_code == 200
    assert host.client.get("/internal/ping").status_code == 200


def test_lists_have_the_names_that_clients_send(host):
    samplers = {
        each["name"]: each["aliases"] for each in host.client.get("/sdapi/v1/samplers").json
    }
    assert samplers["DPM++ 2M"][0] == "dpmpp_2m" and samplers["Euler a"][0] == "euler_a"
    for name in samplers:
        assert host.post(TXT, {"prompt": "a", "sampler_name": name}).status_code == 200
    for schedule in host.client.get("/sdapi/v1/schedulers").json:
        for name in (schedule["name"], schedule["label"]):
            body = {"prompt": "a", "sampler_name": "DPM++ 2M", "scheduler": name}
            assert host.post(TXT, body).status_code == 200
    for lora in host.client.get("/sdapi/v1/loras").json:
        for name in (lora["name"], lora["alias"]):
            assert host.post(TXT, {"prompt": f"a <lora:{name}:1>"}).status_code == 200


def test_what_is_not_here_is_told_in_a1111s_shape(host):
    for answer in (
        host.client.get("/sdapi/v1/nothing"),
        host.client.post("/sdapi/v1/interrogate"),
        host.client.post("/sdapi/v1/train/embedding", data=b"x"),
    ):
        assert answer.status_code == 404 and "detail" in answer.get_json()
    assert host.client.post("/sdapi/v1/refresh-loras").status_code == 200
    for options, status in (
        ({"sd_model_checkpoint": "sdxl", "CLIP_stop_at_last_layers": 1}, 200),
        ({"CLIP_stop_at_last_layers": 2}, 422),
        ({"sd_vae": "x"}, 422),
        ({"unheard_of": 1}, 400),
    ):
        assert host.post("/sdapi/v1/options", options).status_code == status, options


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, spec in read_table().items()
        if (spec.guidance, spec.output) == ("distilled", "image")
    ],
)
def test_guidance_of_forges_clients_on_a_distilled_model(name):
    with ReadingHost(type=name) as flux:
        plain = {"prompt": "a", "seed": 1}
        if name == "flux_fill":  # it changes an image, which text alone does not bring
            answer = flux.post(TXT, plain)
            assert answer.status_code == 400 and message_of(answer).startswith("image is missing")
            return
        forge = {**plain, "cfg_scale": 1, "distilled_cfg_scale": 3.25}
        assert flux.is_same(TXT, forge, {**plain, "guidance_scale": 3.25})
        for off in (1, 1.0, "1", "1.0"):
            assert flux.is_same(TXT, {**plain, "cfg_scale": off}, plain)
            assert flux.is_same(TXT, {**forge, "cfg_scale": off}, {**plain, "guidance_scale": 3.25})
        assert flux.is_same(TXT, {**plain, "cfg_scale": 2.5}, {**plain, "guidance_scale": 2.5})
        answer = flux.post(TXT, {**forge, "cfg_scale": 4})
        assert answer.status_code == 422 and "distilled_cfg_scale" in message_of(answer)
        answer = flux.post(TXT, {**plain, "cfg_scale": 1, "distilled_cfg_scale": -3})
        assert answer.status_code == 400
        assert message_of(answer).startswith("distilled_cfg_scale=-3")


def test_distilled_guidance_means_nothing_to_other_models(host):
    body = {"prompt": "a", "seed": 1, "cfg_scale": 4, "distilled_cfg_scale": 3.5}
    assert host.is_same(TXT, body, {"prompt": "a", "seed": 1, "guidance_scale": 4})


def test_info_tells_of_a_prompt_that_was_cut():
    with ReadingHost(type="sd3") as host:
        host.report = {"unread_tokens": 9}
        info = json.loads(host.post(TXT, {"prompt": "a"}).get_json()["info"])
        assert info["notes"] == [
            "the last 9 tokens of the prompt were not read: the model takes no more."
        ]
