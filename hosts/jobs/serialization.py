"""Requests, results and errors <-> JSON and named arrays, as the job store writes them. No pickle;
imports no torch.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from backends import errors
from backends.errors import FieldError, HostError, RankError
from backends.plan import Exactness
from backends.request import Array, Audio, GenerateRequest, GenerateResult
from hosts.jobs.job import Job, JobStatus, now

logger = logging.getLogger(__name__)

Arrays = dict[str, Array]
KINDS = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, HostError)
}

Id = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z_-]{0,99}$")]
"""Names a folder."""


class StoredJob(BaseModel):
    """A row of the job store, without its packed request, result and error."""

    model_config = ConfigDict(allow_inf_nan=False)

    id: Id
    client: str = ""
    owner: str = ""
    key: str | None = None
    fingerprint: str = ""
    state: JobStatus = JobStatus.FAILED
    attempts: int = 0
    cancel_requested: bool = False
    cancel_reason: str = ""
    deadline_s: float | None = None
    created_s: float = Field(default_factory=now)
    started_s: float | None = None
    ended_s: float | None = None
    step: int = 0
    num_steps: int = 0


class ResultFacts(BaseModel):
    """The packed facts of a result."""

    seed: int
    num_steps: int
    exactness: Exactness
    seconds: float
    report: dict[str, Any]
    resolved: dict[str, Any]
    arrays: list[str]
    sampling_rate: int = 0
    """Of the array `audio`, in Hz."""


def unpack_job(row: Mapping[str, Any], read: Callable[[str, str], Array]) -> Job | None:
    """Return the job of a row; a failed one if it is damaged, None if not even its id is left.

    read: (folder, name) -> array.
    """
    try:
        return _intact_job(row, read)
    except Exception as error:  # noqa: BLE001  damage can be anywhere and raise anything
        logger.error("job %r in the store cannot be read: %s", row["id"], error)
    try:
        facts = StoredJob(id=row["id"])
    except ValidationError:
        return None
    job = _job(facts, GenerateRequest())
    job.error = HostError("what was stored of this job cannot be read any more. Send it again.")
    job.ended_s = facts.created_s
    job.finished.set()
    return job


def _intact_job(row: Mapping[str, Any], read: Callable[[str, str], Array]) -> Job:
    """Any exception if something of the job cannot be read."""
    facts = StoredJob.model_validate(row)
    is_over = facts.state not in (JobStatus.QUEUED, JobStatus.RUNNING)
    inputs = None if is_over else partial(read, f"{facts.id}.request")
    job = _job(facts, unpack_request(row["request"], inputs))
    if not is_over:
        job.ended_s = None
        return job
    job.ended_s = job.ended_s or now()
    if facts.state is JobStatus.DONE:
        job.result = unpack_result(row["result"], partial(read, f"{job.id}.result"))
    else:
        job.error = unpack_error(row["error"])
    job.finished.set()
    return job


def _job(facts: StoredJob, request: GenerateRequest) -> Job:
    values = facts.model_dump()
    status = values.pop("state")
    return Job(request=request, is_kept=True, is_stored=True, status=status, **values)


def read_array(path: Path) -> Array:
    """Return the array of a .npy file. Any exception if it is damaged: its header is parsed as
    Python. Takes no more memory than the file's size, whatever its header says.
    """
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}[version]
        shape, _, dtype = read(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size != path.stat().st_size - file.tell():
            raise ValueError(f"{path.name} does not hold the array that its header describes")
        file.seek(0)
        return np.load(file, allow_pickle=False)


def pack_request(request: GenerateRequest) -> tuple[str, Arrays]:
    """Return JSON of the plain fields, and the arrays and images by name."""
    plain: dict[str, Any] = {}
    images: dict[str, int | None] = {}
    arrays: Arrays = {}
    for name in sorted(request.model_fields_set):
        value = getattr(request, name)
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif isinstance(value, Image.Image):
            arrays[name], images[name] = _pixels(value), None
        elif isinstance(value, list) and value and isinstance(value[0], Image.Image):
            arrays |= {f"{name}.{index}": _pixels(image) for index, image in enumerate(value)}
            images[name] = len(value)
        else:
            plain[name] = value
    tensors = [name for name in arrays if name.partition(".")[0] not in images]
    return json.dumps(
        {"plain": plain, "tensors": tensors, "images": images}, sort_keys=True
    ), arrays


def unpack_request(text: str, read: Callable[[str], Array] | None) -> GenerateRequest:
    """Return the packed request. read: returns the array of a name; None leaves arrays and images
    out, for a job that is over.
    """
    packed = json.loads(text)
    values = dict(packed["plain"])
    if read is not None:
        values |= {name: read(name) for name in packed["tensors"]}
        for name, count in packed["images"].items():
            names = [name] if count is None else [f"{name}.{index}" for index in range(count)]
            images = [Image.fromarray(read(each), mode="RGB") for each in names]
            values[name] = images[0] if count is None else images
    return GenerateRequest(**values)


def fingerprint(request: GenerateRequest) -> str:
    """Return a hash that is equal exactly for equal requests."""
    text, arrays = pack_request(request)
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name} {array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def pack_result(result: GenerateResult) -> tuple[str, Arrays]:
    facts = {
        name: getattr(result, name)
        for name in ("seed", "num_steps", "exactness", "seconds", "report", "resolved")
    }
    arrays = {
        "frames": result.frames,
        **({"latents": result.latents} if result.latents is not None else {}),
    }
    if result.audio is not None:
        arrays["audio"], facts["sampling_rate"] = result.audio.samples, result.audio.sampling_rate
    return json.dumps({**facts, "arrays": list(arrays)}, default=str), arrays


def unpack_result(text: str, read: Callable[[str], Array]) -> GenerateResult:
    """Return the packed result. Any exception if the text or an array is damaged."""
    facts = ResultFacts.model_validate_json(text).model_dump()
    arrays = {name: read(name) for name in facts.pop("arrays")}
    rate, samples = facts.pop("sampling_rate"), arrays.pop("audio", None)
    audio = None if samples is None else Audio(samples=samples, sampling_rate=rate)
    made = GenerateResult(**{"latents": None, **facts, **arrays}, audio=audio)
    is_image = made.frames.ndim == 4 and made.frames.shape[-1] in (3, 4)
    if made.frames.dtype != np.uint8 or not is_image:
        raise ValueError(f"frames of {made.frames.dtype} {made.frames.shape} are no images")
    if made.latents is not None and made.latents.dtype != np.float32:
        raise ValueError(f"latents of {made.latents.dtype} are no latents")
    if samples is not None and (samples.dtype != np.float32 or samples.ndim != 2 or rate < 1):
        raise ValueError(f"samples of {samples.dtype} {samples.shape} at {rate} Hz are no sound")
    return made


def pack_error(error: HostError) -> str:
    kind = next(each for each in type(error).__mro__ if each.__name__ in KINDS)
    facts: dict[str, Any] = {"kind": kind.__name__, "message": str(error)}
    if isinstance(error, RankError):
        facts["rank"] = error.rank
    if isinstance(error, FieldError):
        facts["field"] = error.field
    return json.dumps(facts)


def unpack_error(text: str) -> HostError:
    facts: Mapping[str, Any] = json.loads(text)
    kind = KINDS.get(str(facts["kind"]), HostError)
    extras = {RankError: "rank", FieldError: "field"}
    names = [name for of, name in extras.items() if issubclass(kind, of) and name in facts]
    return kind(str(facts["message"]), **{name: facts[name] for name in names})


def _pixels(image: Image.Image) -> Array:
    """Return uint8 (h, w, 3). Images of requests are RGB."""
    return np.asarray(image.convert("RGB"))
