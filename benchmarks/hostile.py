"""python -m benchmarks.hostile --bodies=10000: valid and senseless fields to every dialect.

Sends the bodies to a real host with a tiny model, over HTTP. No answer may be a 5xx other than 503,
no job may need a second attempt, no traceback may be in the log, the host may not grow by more than
MOST_GROWTH_MB, and the next image must be the one that it was. Prints JSON and ends with code 1 if
one of these happened.

--kind=raw sends requests with wrong bytes at the socket instead. --kind=store opens job stores with
wrong bits: each must open, and what can be read goes on.
"""

import argparse
import base64
import io
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from backends.request import GenerateRequest
from benchmarks import localai_door
from hosts.compat import fields as compat
from hosts.dialects import a1111_extras, a1111_fields, a1111_lists, a1111_options, openai_fields
from hosts.http import jobs_api
from tests.checkpoints import checkpoint, lora, sample_image
from tests.hosts.harness import RunningHost, start_launcher
from tests.hosts.http.raw_bytes import hostile_bytes, is_a_failure, status_of
from tests.hosts.jobs.damage import damaged, jobs_left_or_error, make_store

SENDERS = 8
CHUNK = 200
SHARE_OF_SENSELESS = 0.35
LONGEST_S = 300
MOST_GROWTH_MB = 500
"""Of all processes of the host: caches of samplers, prompts and results have bounds."""


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


IMAGE = encoded(sample_image(24))
SMALL = {"width": 64, "height": 64}
FILMS = {
    "svd": {"image": IMAGE, "num_frames": 2},
    "wan_t2v": {"prompt": "a red car", "num_frames": 1},
}
"""Type of videos -> what each of its requests must have."""
REMIXED = "wan_t2v"
"""A type of videos that reads a prompt."""
GRPC = "grpc:"
"""Before the method of a path that is LocalAI's."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a dialect: its fields, and those that keep a valid body small."""

    path: str
    """With {id}, that of a video which is made before. A path of gRPC begins with its method."""
    names: tuple[str, ...]
    always: Mapping[str, Any] = field(default_factory=dict)
    type: str = "sdxl"


def calls() -> list[Call]:
    own = {"prompt": "a red car", "num_inference_steps": 1, **SMALL}
    theirs = {"prompt": "a red car", "steps": 1, **SMALL}
    video = {"input_reference": IMAGE, "num_inference_steps": 1, "num_frames": 2, **SMALL}
    image = {"init_images": [IMAGE]}
    localai = {"step": 1, **SMALL}
    filmed = {"start_image": IMAGE, "num_frames": 2, **localai}
    doubled = {"upscaler_1": "Lanczos", "upscaling_resize": 2}
    return [
        Call(path="/v1/jobs", names=tuple(jobs_api.RULES), always=own),
        Call(path="/generate", names=tuple(compat.RULES), always=own),
        Call(path="/v1/images/generations", names=tuple(openai_fields.IMAGES), always=theirs),
        Call(
            path="/v1/images/edits",
            names=tuple(openai_fields.EDITS),
            always={**theirs, "image": IMAGE},
        ),
        Call(
            path="/v1/images/variations",
            names=tuple(openai_fields.VARIATIONS),
            always={"steps": 1, **SMALL, "image": IMAGE},
        ),
        Call(path="/sdapi/v1/txt2img", names=tuple(a1111_fields.TXT2IMG), always=theirs),
        Call(
            path="/sdapi/v1/img2img", names=tuple(a1111_fields.IMG2IMG), always={**theirs, **image}
        ),
        Call(
            path="/sdapi/v1/extra-single-image",
            names=tuple(a1111_extras.RULES),
            always={"image": IMAGE, **doubled},
        ),
        Call(
            path="/sdapi/v1/extra-batch-images",
            names=tuple(a1111_extras.BATCH),
            always={"imageList": [{"data": IMAGE}], **doubled},
        ),
        Call(path="/sdapi/v1/png-info", names=tuple(a1111_lists.PNG_INFO), always={"image": IMAGE}),
        Call(path="/sdapi/v1/options", names=tuple(a1111_options.RULES)),
        Call(
            path=f"{GRPC}GenerateImage",
            names=localai_door.fields_of("GenerateImage"),
            always={"positive_prompt": "a red car", **localai},
        ),
        Call(path="/v1/videos", names=tuple(openai_fields.VIDEOS), always=video, type="svd"),
        Call(
            path=f"{GRPC}GenerateVideo",
            names=localai_door.fields_of("GenerateVideo"),
            always=filmed,
            type="svd",
        ),
        Call(path="/v1/videos/{id}/remix", names=tuple(openai_fields.REMIX), type=REMIXED),
    ]


VALID: dict[str, tuple[Any, ...]] = {
    "prompt": ("a (red:1.2) car BREAK a dog", "a <lora:lora:0.5> car", "car, " * 60, "[a]", "\\("),
    "negative_prompt": ("blurry", "((bad))", ""),
    "seed": (1, "5", -1, 2**63 - 1),
    "num_inference_steps": (1, 2),
    "steps": (1, 2),
    "width": (64, 72),
    "height": (64, 72),
    "size": ("64x64", "auto"),
    "n": (1, 2, None),
    "n_iter": (1, 2),
    "batch_size": (1, 2),
    "sampler_name": ("Euler a", "DPM++ 2M Karras", "DPM++ 2M", "Heun", ""),
    "scheduler": ("euler", "Karras", "SGM Uniform", {"scheduler": "heun"}, "dpmpp_2m"),
    "strength": (0.0, 0.5, 1.0),
    "denoising_strength": (0.0, 0.5, 1.0),
    "guidance_scale": (1, 5.5),
    "cfg_scale": (1, 7),
    "clip_skip": (0, 1),
    "init_image": (IMAGE,),
    "mask_image": (IMAGE,),
    "mask": (IMAGE,),
    "init_images": ([IMAGE],),
    "image": (IMAGE, [IMAGE]),
    "lora": ({"lora.safetensors": 0.5}, {}),
    "sigmas": ([14.0, 3.0, 0.0],),
    "timesteps": ([900, 400],),
    "prompt_syntax": ("a1111", None),
    "quality": ("auto", "exact", "high"),
    "response_format": ("url", "b64_json"),
    "output_format": ("png", "jpeg", "webp"),
    "output_compression": (0, 50, 100),
    "stream": (True, False),
    "partial_images": (0, 2),
    "background": ("auto", "opaque"),
    "override_settings": ({}, {"CLIP_stop_at_last_layers": 2}, {"samples_format": "jpg"}),
    "alwayson_scripts": ({}, {"controlnet": {"args": []}}),
    "num_frames": (1, 2),
    "seconds": ("0.3", 0.3),
    "denoising_end": (0.5, 1.0),
    "first_step": (0,),
    "stop_step": (1, 2),
    "strict": (True, False),
    "upscaler_1": ("Lanczos", "Nearest", "None"),
    "upscaling_resize": (1, 2, 1.5),
    "upscaling_resize_w": (64, 96),
    "resize_mode": (0, 1),
    "imageList": ([{"data": IMAGE}], [{"data": IMAGE, "name": "a.png"}] * 2),
    "samples_format": ("png", "jpg"),
    "step": (1, 2),
    "positive_prompt": ("a red car", "car, " * 60),
    "CLIPSkip": (0, 1),
    "src": (IMAGE, "/etc/hostname"),
    "start_image": (IMAGE,),
    "ref_images": ([IMAGE],),
    "fps": (1, 7),
    "params": ({"decode_chunk_size": "1"}, {"motion_bucket_id": "5"}, {"strength": "x"}),
}
TEXTS = (
    "", " ", "a\u0000b", "\ud83d", "nan", "64x64", "0x0", "true", "-1", "1e9", "euler",
    '{"scheduler": 5}', "/etc/passwd", "../../x", "data:image/png;base64,AAAA", "gASV", "k05VTVBZ",
    "x" * 3000, IMAGE[:60], encoded(sample_image(9), "WEBP"), "(" * 300, "a:99999)", "[a:b:0.5]",
    "a AND b", "\u202e\u0301" * 50, "<lora:x:1>", "<lora:lora:1e400>",
)  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 8, 64, 100, -1, 0.5, 1.5, 1e308, float("nan"), float("inf"), 10**400, 2**63, 2**64,
    True, False, None,
)  # fmt: skip
NAMES = ("args", "image", "controlnet", "enabled", "sd_vae", "image_url", "scheduler", "a",
         "CLIP_stop_at_last_layers", "x.safetensors", "lora.safetensors", "use_karras_sigmas",
         "prediction_type", "beta_schedule", "timestep_spacing")  # fmt: skip


def body(call: Call, chance: random.Random) -> dict[str, Any]:
    """Return a small body with up to five more fields."""
    made = dict(call.always)
    for _ in range(chance.randrange(6)):
        name = chance.choice((*call.names, "strict", "unheard_of"))
        is_valid = name in VALID and chance.random() > SHARE_OF_SENSELESS
        made[name] = chance.choice(VALID[name]) if is_valid else senseless(chance)
    return made


def senseless(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(4 if depth < 3 else 2)
    if kind == 0:
        return chance.choice(TEXTS)
    if kind == 1:
        return chance.choice(NUMBERS)
    inner = (senseless(chance, depth + 1) for _ in range(chance.randrange(4)))
    return list(inner) if kind == 2 else {chance.choice(NAMES): value for value in inner}


Send = Callable[[Mapping[str, Any]], tuple[int, str]]
"""Return status and text of the answer to a body, which is read to its end."""


@contextmanager
def sender(host: RunningHost, call: Call) -> Iterator[Send]:
    """Open the way to a call."""
    if call.path.startswith(GRPC):
        with localai_door.opened(host.url(""), call.type) as door:
            yield partial(door.send, call.path.removeprefix(GRPC))
        return
    path = call.path
    if "{id}" in path:
        content = {**FILMS[call.type], **SMALL, "num_inference_steps": 1}
        answer = requests.post(host.url("/v1/videos"), json=content, timeout=LONGEST_S)
        path = path.format(id=answer.json()["id"])
    yield partial(send, host, path)


def send(host: RunningHost, path: str, content: Mapping[str, Any]) -> tuple[int, str]:
    data = json.dumps(content).encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    answer = requests.post(host.url(path), data=data, headers=headers, timeout=LONGEST_S)
    return answer.status_code, answer.text


def attack(host: RunningHost, call: Call, number: int, seed: int, post: Send) -> dict[str, Any]:
    """Send the bodies and return what came of them."""
    chance, found = random.Random(f"{seed} {call.path}"), Counter[int]()
    wrong, attempts, started = [], 1, time.monotonic()
    with ThreadPoolExecutor(SENDERS) as senders:
        for size in (*[CHUNK] * (number // CHUNK), number % CHUNK):
            chunk = [body(call, chance) for _ in range(size)]
            for content, (status, text) in zip(chunk, senders.map(post, chunk), strict=True):
                found[status] += 1
                if status >= 500 and status != 503:
                    wrong.append({"body": repr(content)[:2000], "answer": text[:500]})
            attempts = max(attempts, most_attempts(host))
            print(f"{call.path} {found.total()} {dict(found)}", file=sys.stderr, flush=True)
    return {
        "bodies": found.total(),
        "status": dict(sorted(found.items())),
        "seconds": round(time.monotonic() - started, 1),
        "wrong": wrong[:5],
        "num_wrong": len(wrong),
        "most_attempts": attempts,
    }


def most_attempts(host: RunningHost) -> int:
    """Wait until no job is left, and return the attempts of the one that needed the most."""
    while True:
        jobs = host.get("/v1/jobs").json()["jobs"]
        if all(job["state"] in ("done", "failed", "cancelled") for job in jobs):
            return max((job["attempts"] for job in jobs), default=1)
        time.sleep(0.2)


def memory_mb(host: RunningHost) -> int:
    """Return what the host's processes have in memory."""
    return sum(process.memory_info().rss for process in host.tree()) // 10**6


def reference(host: RunningHost, call: Call) -> bytes:
    """Return the file of a plain request to the type of this call."""
    content = {**SMALL, "num_inference_steps": 1, "seed": 7}
    content |= FILMS.get(call.type, {"prompt": "a red car"})
    headers = {"Accept": "image/gif" if call.type in FILMS else "image/png"}
    answer = requests.post(host.url("/generate"), json=content, headers=headers, timeout=LONGEST_S)
    assert answer.status_code == 200, answer.text[:500]
    return answer.content


def attack_socket(host: RunningHost, number: int, seed: int) -> dict[str, Any]:
    """Send requests with wrong bytes and return what came of them."""
    chance, found = random.Random(seed), Counter[int | None]()
    wrong, started = [], time.monotonic()
    with ThreadPoolExecutor(SENDERS) as senders:
        for size in (*[CHUNK] * (number // CHUNK), number % CHUNK):
            chunk = [hostile_bytes(chance) for _ in range(size)]
            waits = [chance.random() < 0.9 for _ in range(size)]
            answers = senders.map(
                lambda data, waits: status_of(host.port, data, waits=waits), chunk, waits
            )
            for data, status in zip(chunk, answers, strict=True):
                found[status] += 1
                if is_a_failure(status):
                    wrong.append({"bytes": repr(data)[:2000], "answer": status})
            print(f"raw {found.total()} {dict(found)}", file=sys.stderr, flush=True)
    return {
        "requests": found.total(),
        "status": {str(status): count for status, count in found.most_common()},
        "seconds": round(time.monotonic() - started, 1),
        "wrong": wrong[:5],
        "num_wrong": len(wrong),
        "most_attempts": most_attempts(host),
    }


def attack_stores(number: int, seed: int) -> dict[str, Any]:
    """Open damaged stores and return how many jobs were left in them."""
    chance, left, wrong, started = random.Random(seed), Counter[int](), [], time.monotonic()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        original, copy = Path(folder) / "original", Path(folder) / "damaged"
        make_store(original)
        for _ in range(number):
            damage = damaged(original, copy, chance)
            found = jobs_left_or_error(copy)
            if isinstance(found, int):
                left[found] += 1
            else:
                wrong.append({"damage": damage, "error": found})
    return {
        "stores": number,
        "jobs_left": dict(sorted(left.items())),
        "seconds": round(time.monotonic() - started, 1),
        "wrong": wrong[:5],
        "num_wrong": len(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bodies", type=int, default=10_000, help="for each call")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="calls whose path holds this text")
    parser.add_argument("--kind", choices=("bodies", "raw", "store"), default="bodies")
    options = parser.parse_args()
    if options.kind == "store":
        result = attack_stores(options.bodies, options.seed)
        is_wrong = bool(result["num_wrong"])
    else:
        result = attack_hosts(options)
        is_wrong = bool(result["tracebacks"] or result["restarts"])
        is_wrong = is_wrong or any(is_beyond(facts) for facts in result["calls"].values())
    print(json.dumps(result, indent=2))
    sys.exit(1 if is_wrong else 0)


def is_beyond(facts: Mapping[str, Any]) -> bool:
    """Whether something happened that may not."""
    before, after = facts["memory_mb"]
    return bool(
        facts["num_wrong"]
        or facts["most_attempts"] > 1
        or not facts["next_image_is_right"]
        or after > before + MOST_GROWTH_MB
    )


def attack_hosts(options: argparse.Namespace) -> dict[str, Any]:
    """Attack one host of each type and return what came of it."""
    assert set(VALID) - {"strict"} <= {name for call in calls() for name in call.names}
    assert set(GenerateRequest.model_fields) <= set(calls()[0].names)
    chosen = [call for call in calls() if options.only in call.path]
    chosen = chosen[:1] if options.kind == "raw" else chosen
    result: dict[str, Any] = {"calls": {}, "tracebacks": 0, "restarts": 0}
    for kind, group in itertools.groupby(chosen, key=lambda call: call.type):
        folder = lora("sdxl").parent
        with start_launcher(
            f"--type={kind}", f"--checkpoint={checkpoint(kind)}", "--max_steps=4", "--max_side=96",
            "--max_frames=4", "--max_images=2", f"--lora_dir={folder}", "--nproc_per_node=1",
        ) as host:  # fmt: skip
            host.wait_until_ready()
            for call in group:
                wanted, before = reference(host, call), memory_mb(host)
                if options.kind == "raw":
                    facts = attack_socket(host, options.bodies, options.seed)
                else:
                    with sender(host, call) as post:
                        facts = attack(host, call, options.bodies, options.seed, post)
                facts["memory_mb"] = [before, memory_mb(host)]
                facts["next_image_is_right"] = reference(host, call) == wanted
                result["calls"]["raw" if options.kind == "raw" else call.path] = facts
            result["tracebacks"] += host.log.count("Traceback")
            result["restarts"] += host.get("/settings").json()["restarts"]
            if "Traceback" in host.log:
                print(host.log[host.log.index("Traceback") - 500 :][:6000], file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
