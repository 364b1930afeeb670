"""OpenAI's images and videos: each field as its protocol means it, streams and errors included."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from hosts.jobs.serialization import fingerprint
from tests.checkpoints import sample_image
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost, message_of

IMAGE = encode_file(sample_image(16))
LARGE = encode_file(sample_image(64))
"""FLUX.2 takes no smaller image."""
GENERATE, EDIT, VIDEO = "/v1/images/generations", "/v1/images/edits", "/v1/videos"


@pytest.fixture(scope="module")
def host():
    with ReadingHost() as running:
        yield running


@pytest.mark.parametrize("quality", ["auto", "standard", "hd", "low", "medium", "high", None, ""])
def test_quality_of_openai_asks_for_nothing(host, quality):
    wanted = {"prompt": "a", "seed": 1}
    assert host.is_same(GENERATE, {**wanted, "quality": quality}, wanted)
    edit = {**wanted, "image": IMAGE, "quality": quality}
    assert host.is_same(EDIT, edit, {**wanted, "init_image": IMAGE})
    form = {"prompt": "a", "seed": "1", "quality": quality or "", "image": file_of(IMAGE)}
    assert host.client.post(EDIT, data=form).status_code == 200
    assert host.is_same(GENERATE, {**wanted, "quality": "exact"}, {**wanted, "quality": "exact"})


@pytest.mark.parametrize("closeness", ["exact", "high", "fast"])
def test_closeness_is_our_quality_also_beside_openais(host, closeness):
    wanted = {"prompt": "a", "seed": 1, "quality": closeness}
    for path in (GENERATE, "/sdapi/v1/txt2img"):
        assert host.is_same(path, {"prompt": "a", "seed": 1, "closeness": closeness}, wanted)
    body = {"quality": "high", "prompt": "a", "seed": 1, "closeness": closeness}
    assert host.is_same(GENERATE, body, wanted)
    assert host.is_same(GENERATE, dict(reversed(body.items())), wanted)


def test_closeness_that_is_not_known_or_contradicts_is_refused(host):
    for path in (GENERATE, "/sdapi/v1/txt2img"):
        answer = host.post(path, {"prompt": "a", "closeness": "best"})
        assert answer.status_code == 400 and "closeness='best'" in message_of(answer)
    for order in (("quality", "closeness"), ("closeness", "quality")):
        body = {"prompt": "a", **{name: "exact" if name == "quality" else "fast" for name in order}}
        answer = host.post(GENERATE, body)
        assert answer.status_code == 400
        assert "quality='exact' and closeness='fast' contradict" in message_of(answer)


def file_of(data, name="a.png"):
    return (io.BytesIO(base64.b64decode(data)), name)


@pytest.mark.parametrize("name", ["dall-e-2", "dall-e-3", "gpt-image-1", "sdxl", "", None])
def test_any_model_name_is_served_by_the_one_that_is_loaded(host, name):
    assert host.post(GENERATE, {"prompt": "a", "model": name}).status_code == 200


@pytest.mark.parametrize("seed", ["5", 5, 5.0, " 5 "])
def test_seeds_count_up_however_they_are_sent(host, seed):
    for path, number in ((GENERATE, "n"), ("/sdapi/v1/txt2img", "n_iter")):
        found = host.reads(path, {"prompt": "a", number: 2, "seed": seed})
        assert [request.seed for request in found] == [5, 6]


def test_seeds_beyond_the_last_are_refused_as_they_were_sent(host):
    for path, number in ((GENERATE, "n"), ("/sdapi/v1/txt2img", "batch_size")):
        answer = host.post(path, {"prompt": "a", number: 2, "seed": 2**63 - 1})
        assert answer.status_code == 400
        assert message_of(answer).startswith("seed=9223372036854775807 leaves no seeds for 2")
        found = host.reads(path, {"prompt": "a", number: 1, "seed": 2**63 - 1})
        assert found[0].seed == 2**63 - 1


@pytest.mark.parametrize("value", ["abc", [1], {"a": 1}, float("inf"), float("nan"), 1e308, -1, 0])
def test_seconds_that_are_none_are_refused(value):
    with ReadingHost(type="svd") as videos:
        answer = videos.post(VIDEO, {"input_reference": IMAGE, "seconds": value})
        assert answer.status_code == 400 and message_of(answer).startswith(
            ("seconds=", "seconds holds")
        )


def test_seconds_become_frames():
    with ReadingHost(type="svd") as videos:
        for value in (2, "2", 2.0):
            found = videos.reads(VIDEO, {"input_reference": IMAGE, "seconds": value})
            assert found[0].num_frames == 14
        found = videos.reads(VIDEO, {"input_reference": IMAGE, "seconds": 2, "fps": 10})
        assert (found[0].num_frames, found[0].fps) == (20, 10)
        for value in (None, []):
            assert (
                videos.post(VIDEO, {"input_reference": IMAGE, "seconds": value}).status_code == 200
            )


def test_videos_are_listed_told_and_deleted():
    with ReadingHost(type="svd") as videos:
        made = videos.post(
            VIDEO, {"input_reference": IMAGE, "seconds": 1, "prompt": "a"}
        ).get_json()
        assert (made["seconds"], made["prompt"]) == ("1", "a") and "x" in made["size"]
        videos.queue.find(made["id"]).wait(20)
        assert [each["id"] for each in videos.client.get(VIDEO).get_json()["data"]] == [made["id"]]
        answer = videos.client.get(f"{VIDEO}/{made['id']}/content?variant=gif")
        assert answer.status_code == 422 and "variant='gif'" in message_of(answer)
        assert videos.client.delete(f"{VIDEO}/{made['id']}").get_json()["deleted"]
        assert videos.client.get(f"{VIDEO}/{made['id']}").status_code == 404


def test_unknown_paths_are_answered_in_openais_shape(host):
    for answer in (
        host.client.get("/v1/nothing"),
        host.client.post("/v1/images/nothing", data={"image": file_of(IMAGE)}),
        host.client.put("/v1/models"),
    ):
        assert answer.status_code in (404, 405) and set(answer.get_json()) == {"error"}
    assert "message" in host.client.get("/v1/jobs/none").get_json()


@pytest.mark.parametrize(
    "image",
    [
        {"image": IMAGE},
        {"image": [IMAGE]},
        {"images": [{"image_url": f"data:image/png;base64,{IMAGE}"}]},
        {"image": {"image_url": {"url": f"data:image/png;base64,{IMAGE}"}}},
    ],
)
def test_image_of_an_edit_may_be_sent_in_each_published_form(host, image):
    wanted = {"prompt": "a", "seed": 1, "init_image": IMAGE}
    assert host.is_same(EDIT, {"prompt": "a", "seed": 1, **image}, wanted)


@pytest.mark.parametrize("empty", [[""], [None], [[]], [{}, ""]])
def test_list_of_empty_images_is_none(host, empty):
    assert host.is_same(EDIT, {"prompt": "a", "seed": 1, "image": IMAGE, "mask": empty},
        {"prompt": "a", "seed": 1, "init_image": IMAGE})  # fmt: skip
    answer = host.post(EDIT, {"prompt": "a", "image": empty})
    assert answer.status_code == 400 and message_of(answer).startswith("image is missing")
    with ReadingHost(type="svd") as films:
        without = films.post(VIDEO, {})
        assert films.post(VIDEO, {"input_reference": empty}).status_code == without.status_code


def with_alpha(mode="RGBA", lowest=0, side=16):
    """(file, its mask): the right half is transparent."""
    picture = sample_image(side).convert("RGBA")
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(lowest, (side // 2, 0, side, side))
    picture.putalpha(alpha)
    return encode_file(picture.convert(mode)), encode_file(ImageOps.invert(alpha))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_of_an_image_without_a_mask_are_its_mask(host, mode):
    picture, mask = with_alpha(mode)
    wanted = {"prompt": "a", "seed": 1, "init_image": picture, "mask_image": mask}
    body = {"prompt": "a", "seed": 1, "image": picture}
    assert host.is_same(EDIT, body, wanted)
    form = {"prompt": "a", "seed": "1", "image": file_of(picture)}
    assert host.client.post(EDIT, data=form).status_code == 200
    assert np.array_equal(
        host.requests[-1].mask_image, host.reads("/v1/jobs", wanted)[0].mask_image
    )
    own = encode_file(Image.new("L", (16, 16), 255))  # a mask that was sent wins
    assert host.is_same(EDIT, {**body, "mask": own}, {**wanted, "mask_image": own})
    assert host.is_same(EDIT, {**body, "mask_image": own}, {**wanted, "mask_image": own})
    opaque, _ = with_alpha(lowest=255)
    assert host.reads(EDIT, {**body, "image": opaque})[0].mask_image is None
    assert host.reads("/v1/images/variations", body)[0].mask_image is None


def test_only_the_first_of_several_images_says_what_may_change():
    picture, form = with_alpha()[0], {"prompt": "a", "seed": 1}
    with ReadingHost(ip_adapter='{"/i": 1}') as host:
        found = host.reads(EDIT, {**form, "image": [picture, IMAGE]})[0]
        assert found.mask_image.getpixel((12, 8)) == (255, 255, 255)
        assert host.reads(EDIT, {**form, "image": [IMAGE, picture]})[0].mask_image is None


def test_transparent_parts_are_refused_where_no_mask_can_be_used():
    picture, _ = with_alpha()
    with ReadingHost(type="flux2") as host:
        answer = host.post(EDIT, {"prompt": "a", "image": [picture, IMAGE]})
        assert answer.status_code == 422
        assert message_of(answer).startswith("image has transparent parts, which are a mask")
        assert "Send it without an alpha channel." in message_of(answer)
        second, _ = with_alpha(side=64)
        assert host.post(EDIT, {"prompt": "a", "image": [LARGE, second]}).status_code == 200
        lax = {"prompt": "a", "image": second, "strict": False}
        assert host.post(EDIT, lax).status_code == 200


def test_images_elsewhere_are_refused(host):
    for image in ({"image_url": "https://example.org/a.png"}, {"file_id": "file-1"}):
        answer = host.post(EDIT, {"prompt": "a", "images": [image]})
        assert answer.status_code == 422 and "fetches nothing" in message_of(answer)


def test_further_images_are_the_ip_adapters_or_refused(host):
    form = {"prompt": "a", "image[]": [file_of(IMAGE, "a.png"), file_of(IMAGE, "b.png")]}
    answer = host.client.post(EDIT, data=form)
    assert answer.status_code == 422 and "image holds 2 images" in message_of(answer)
    with ReadingHost(ip_adapter='{"/i": 1}') as other:
        found = other.reads(EDIT, {"prompt": "a", "image": [IMAGE, IMAGE]})[0]
        assert found.init_image is not None and len(found.ip_adapter_image) == 1


def test_several_images_go_to_a_model_that_refers_to_them():
    with ReadingHost(type="flux2") as host:
        form = {"prompt": "a", "image[]": [file_of(LARGE, "a.png"), file_of(LARGE, "b.png")]}
        assert host.client.post(EDIT, data=form).status_code == 200
        found = host.requests[-1]
        assert len(found.image) == 2 and found.init_image is None
        assert host.is_same(EDIT, {"prompt": "a", "seed": 1, "image": LARGE},
                            {"prompt": "a", "seed": 1, "image": LARGE})  # fmt: skip
        answer = host.post(EDIT, {"prompt": "a", "images": [LARGE] * 11})
        assert answer.status_code == 400, answer.get_data(as_text=True)
        assert "images holds 11 images" in message_of(answer)


def test_an_image_that_the_model_does_not_take_is_refused_by_name(host):
    answer = host.post("/v1/jobs", {"prompt": "a", "image": [IMAGE, IMAGE]})
    assert answer.status_code == 422
    assert "image is not available: " in message_of(answer)
    with ReadingHost(type="svd") as videos:
        answer = videos.post("/v1/jobs", {"image": [IMAGE, IMAGE]})
        assert answer.status_code == 400
        assert "image holds 2 images. Stable Video Diffusion takes 1." in message_of(answer)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"background": "transparent"}, 422, "background='transparent' is not available"),
        ({"output_compression": 101, "output_format": "webp"}, 400, "output_compression=101"),
        ({"partial_images": 2}, 400, "partial_images=2 has no effect without stream"),
        ({"partial_images": 0}, 200, ""),
        ({"size": "0x64"}, 400, "size: width=0 is not allowed"),
        ({"closeness": "Best"}, 400, "closeness='Best' is not allowed"),
        (
            {"scheduler": {"sampler": "heun"}},
            400,
            "scheduler setting 'sampler' is not a setting of any scheduler. Did you mean 'sched",
        ),
        (
            {"scheduler": {"timestep_spacing": "Lead"}},
            400,
            "scheduler setting timestep_spacing='Lead'",
        ),
        ({"output_compression": 50}, 400, "output_compression=50 is not for PNG"),
        ({"output_format": {}}, 200, ""),
        ({"output_format": ["png"]}, 400, "output_format=['png'] is not allowed"),
        ({"response_format": {"a": 1}}, 400, "response_format="),
        ({"stream": "perhaps"}, 400, "stream='perhaps' is not allowed"),
        ({"partial_images": 4, "stream": True}, 400, "partial_images=4"),
        ({"n": None}, 200, ""),
        ({"size": [64, 64]}, 400, "size=[64, 64] is not allowed"),
    ],
)
def test_fields_are_read_or_refused(host, fields, status, said):
    answer = host.post(GENERATE, {"prompt": "a", **fields})
    assert answer.status_code == status, answer.get_data(as_text=True)
    assert not said or message_of(answer).startswith(said)


def test_compression_makes_smaller_files(host):
    sizes = []
    for quality in (1, 100):
        body = {"prompt": "a", "output_format": "jpeg", "output_compression": quality,
            "response_format": "b64_json"}  # fmt: skip
        data = host.post(GENERATE, body).get_json()["data"][0]["b64_json"]
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == "JPEG"
        sizes.append(len(data))
    assert sizes[0] < sizes[1]


def test_forms_are_read_as_json_is(host):
    form = {"prompt": "a", "seed": "1", "steps": "3", "guidance": "2.5", "n": "1", "width": "64",
        "image": file_of(IMAGE)}  # fmt: skip
    before = len(host.requests)
    assert host.client.post(EDIT, data=form).status_code == 200
    wanted = {"prompt": "a", "seed": 1, "num_inference_steps": 3, "guidance_scale": 2.5,
        "width": 64, "init_image": IMAGE}  # fmt: skip
    ours = host.reads("/v1/jobs", wanted)[0]
    assert fingerprint(host.requests[before]) == fingerprint(ours)
    answer = host.client.post(EDIT, data={**form, "image": file_of(IMAGE), "steps": "many"})
    assert answer.status_code == 400 and message_of(answer).startswith("steps='many'")


@pytest.mark.parametrize("part", ["", '; filename="a.png"', "; nam=prompt"])
def test_part_of_a_form_without_a_name_is_the_clients_mistake(host, part):
    form = f"--b\r\nContent-Disposition: form-data{part}\r\n\r\na\r\n--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    answer = host.client.post(EDIT, data=form.encode(), content_type=kind)
    assert answer.status_code == 400 and "has no name" in message_of(answer)


def test_variations_start_from_the_image_and_need_no_prompt(host):
    path = "/v1/images/variations"
    wanted = {"prompt": " ", "seed": 1, "init_image": IMAGE}
    assert host.is_same(path, {"seed": 1, "image": IMAGE}, wanted)
    own = {"prompt": "a", "seed": 1, "image": IMAGE, "strength": 0.4}
    assert host.is_same(path, own, {**wanted, "prompt": "a", "strength": 0.4})
    form = {"image": file_of(IMAGE), "n": "2", "size": "64x64", "response_format": "b64_json"}
    answer = host.client.post(path, data=form)
    assert answer.status_code == 200 and len(answer.get_json()["data"]) == 2
    assert host.post(path, {"prompt": "a"}).status_code == 400
    assert host.post(path, {"image": [IMAGE, IMAGE]}).status_code == 400
    with ReadingHost(ip_adapter='{"/i": 1}') as other:
        found = other.reads(path, {"image": IMAGE})[0]
        assert found.init_image is None and found.ip_adapter_image is not None


def test_variants_of_a_video_are_images_of_it():
    with ReadingHost(type="svd", num_frames=5) as videos:
        made = videos.post(VIDEO, {"input_reference": IMAGE}).get_json()["id"]
        while videos.client.get(f"{VIDEO}/{made}").get_json()["status"] != "completed":
            pass
        for variant, kind, size in (
            ("thumbnail", "image/webp", (24, 16)), ("spritesheet", "image/jpeg", (72, 32)),
        ):  # fmt: skip
            answer = videos.client.get(f"{VIDEO}/{made}/content?variant={variant}")
            assert (answer.status_code, answer.mimetype) == (200, kind)
            assert Image.open(io.BytesIO(answer.data)).size == size
        wrong = videos.client.get(f"{VIDEO}/{made}/content?variant=gif")
        assert wrong.status_code == 422 and "thumbnail" in message_of(wrong)
        refused = videos.post(f"{VIDEO}/{made}/remix", {"prompt": "b"})
        assert refused.status_code == 422 and "reads no prompt" in message_of(refused)


def test_remix_is_the_same_video_with_another_prompt():
    with ReadingHost(type="wan_t2v") as videos:
        body = {"prompt": "a", "seed": 3, "seconds": 1, "size": "64x64"}
        made = videos.post(VIDEO, body).get_json()["id"]
        answer = videos.post(f"{VIDEO}/{made}/remix", {"prompt": "b"}).get_json()
        assert answer["remixed_from_video_id"] == made and answer["prompt"] == "b"
        while len(videos.requests) < 2:
            pass
        first, second = videos.requests
        assert fingerprint(second) == fingerprint(first.model_copy(update={"prompt": "b"}))
        for wrong in ({}, {"prompt": 5}, {"prompt": "b", "size": "9x9"}):
            answer = videos.post(f"{VIDEO}/{made}/remix", wrong)
            assert answer.status_code == 400 and message_of(answer)
        assert videos.post(f"{VIDEO}/none/remix", {"prompt": "b"}).status_code == 404


def test_every_image_of_one_call_is_in_the_answer_of_each_dialect():
    """QwenImageLayered makes one image for each layer."""
    with ReadingHost(num_frames=3) as layered:
        body = {"prompt": "a", "seed": 5}
        in_text = layered.post(GENERATE, {**body, "response_format": "b64_json"}).get_json()["data"]
        files = [base64.b64decode(each["b64_json"]) for each in in_text]
        links = [each["url"] for each in layered.post(GENERATE, body).get_json()["data"]]
        answers = [layered.client.get(link) for link in links]
        with layered.post(GENERATE, {**body, "stream": True}) as stream:
            streamed = stream.get_data(as_text=True)
        a1111 = layered.post("/sdapi/v1/txt2img", body).get_json()["images"]
        last = layered.client.get(f"{links[0]}&image=3")
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    for found in (files, [one.data for one in answers], [base64.b64decode(one) for one in a1111]):
        images = [np.asarray(Image.open(io.BytesIO(one))) for one in found]
        assert (np.stack(images) == frames).all()
    assert {one.headers["X-Images"] for one in answers} == {"3"}
    assert streamed.count("event: image_generation.completed") == 3
    assert last.status_code == 400 and "Allowed: 0 to 2" in message_of(last)
