"""python -m benchmarks.hostile --bodies=10000: valid and senseless fields to every dialect.

Sends the bodies to a real host with a tiny model, over HTTP. No answer may be a 5xx other than 503,
no job may need a second attempt, and no traceback may be in the log. Prints JSON and ends with code
1 if one of these happened.
"""

import argparse
import base64
import io
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import requests
from PIL import Image

from backends.request import GenerateRequest
from hosts.compat import fields as compat
from hosts.dialects import a1111_fields, openai_fields
from hosts.http import jobs_api
from tests.checkpoints import checkpoint, lora, sample_image
from tests.hosts.harness import RunningHost, start_launcher

SENDERS = 8
CHUNK = 200
SHARE_OF_SENSELESS = 0.35
LONGEST_S = 300


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


IMAGE = encoded(sample_image(24))
SMALL = {"width": 64, "height": 64}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a dialect: its fields, and those that keep a valid body small."""

    path: str
    names: tuple[str, ...]
    always: Mapping[str, Any] = field(default_factory=dict)
    type: str = "sdxl"


def calls() -> list[Call]:
    own = {"prompt": "a red car", "num_inference_steps": 1, **SMALL}
    theirs = {"prompt": "a red car", "steps": 1, **SMALL}
    video = {"input_reference": IMAGE, "num_inference_steps": 1, "num_frames": 2, **SMALL}
    image = {"init_images": [IMAGE]}
    return [
        Call(path="/v1/jobs", names=tuple(jobs_api.RULES), always=own),
        Call(path="/generate", names=tuple(compat.RULES), always=own),
        Call(path="/v1/images/generations", names=tuple(openai_fields.IMAGES), always=theirs),
        Call(
            path="/v1/images/edits",
            names=tuple(openai_fields.EDITS),
            always={**theirs, "image": IMAGE},
        ),
        Call(path="/sdapi/v1/txt2img", names=tuple(a1111_fields.TXT2IMG), always=theirs),
        Call(
            path="/sdapi/v1/img2img", names=tuple(a1111_fields.IMG2IMG), always={**theirs, **image}
        ),
        Call(path="/v1/videos", names=tuple(openai_fields.VIDEOS), always=video, type="svd"),
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


def send(host: RunningHost, call: Call, content: Mapping[str, Any]) -> tuple[int, str]:
    """Return status and text of the answer, which is read to its end."""
    data = json.dumps(content).encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    answer = requests.post(host.url(call.path), data=data, headers=headers, timeout=LONGEST_S)
    return answer.status_code, answer.text


def attack(host: RunningHost, call: Call, number: int, seed: int) -> dict[str, Any]:
    """Send the bodies and return what came of them."""
    chance, found = random.Random(f"{seed} {call.path}"), Counter[int]()
    wrong, attempts, started = [], 1, time.monotonic()
    with ThreadPoolExecutor(SENDERS) as senders:
        for size in (*[CHUNK] * (number // CHUNK), number % CHUNK):
            chunk = [body(call, chance) for _ in range(size)]
            for content, (status, text) in zip(
                chunk, senders.map(lambda each: send(host, call, each), chunk), strict=True
            ):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bodies", type=int, default=10_000, help="for each call")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="calls whose path holds this text")
    options = parser.parse_args()
    assert set(VALID) - {"strict"} <= {name for call in calls() for name in call.names}
    assert set(GenerateRequest.model_fields) <= set(calls()[0].names)
    chosen = [call for call in calls() if options.only in call.path]
    result: dict[str, Any] = {"calls": {}, "tracebacks": 0, "restarts": 0}
    for kind, group in itertools.groupby(chosen, key=lambda call: call.type):
        folder = lora("sdxl").parent
        with start_launcher(
            f"--type={kind}", f"--checkpoint={checkpoint(kind)}", "--max_steps=4", "--max_side=96",
            "--max_frames=4", "--max_images=2", f"--lora_dir={folder}", "--nproc_per_node=1",
        ) as host:  # fmt: skip
            host.wait_until_ready()
            for call in group:
                result["calls"][call.path] = attack(host, call, options.bodies, options.seed)
            result["tracebacks"] += host.log.count("Traceback")
            result["restarts"] += host.get("/settings").json()["restarts"]
            if "Traceback" in host.log:
                print(host.log[host.log.index("Traceback") - 500 :][:6000], file=sys.stderr)
    print(json.dumps(result, indent=2))
    is_wrong = result["tracebacks"] or result["restarts"]
    for facts in result["calls"].values():
        is_wrong = is_wrong or facts["num_wrong"] or facts["most_attempts"] > 1
    sys.exit(1 if is_wrong else 0)


if __name__ == "__main__":
    main()
