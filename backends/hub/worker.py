"""The process that talks to the hub: it lists repositories, reads the headers of their weights, and
downloads. Imports no torch.

A program of its own, so that a host can end a download at once, and its libraries stay offline. One
JSON request comes on standard input, JSON lines go to standard output: progress, then the outcome.
It ends with its parent, when standard input is closed.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from backends.errors import ConfigError

TELL_EVERY_S = 0.3
CONNECTIONS = 4
"""Files that are downloaded at the same time."""
FIRST_BYTES = 1 << 20
"""Of a file of weights: enough for most headers."""
SHA256_LENGTH = 64
"""Of the ETags of large files, which are hashes of their content."""
GGUF_BYTES = 1 << 23
"""The longest GGUF header that is read; its length is written nowhere."""


class Refusal(Exception):
    """A reason to stop that backends/hub/client.py words."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(facts["kind"])
        self.facts = facts


def main() -> None:
    """Run one request of backends/hub/client.py."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["HF_HUB_OFFLINE"] = "0"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        if request["do"] == "outline":
            _outline(request)
        else:
            _download(request)
        _say({"done": True})
    except Exception as error:  # noqa: BLE001  the parent reports it in one line
        _say({"error": _describe(error)})


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


_speaking = threading.Lock()


def _say(message: Mapping[str, Any]) -> None:
    with _speaking:
        print(json.dumps(message), flush=True)  # noqa: T201  the protocol with the parent


def _describe(error: BaseException) -> dict[str, Any]:
    """Return the kind of an error as backends/hub/client.py words it."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, Refusal):
        return error.facts
    if isinstance(error, ConfigError):
        return {"kind": "choice", "text": str(error)}

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    text = " ".join(str(error).split())[:300]
    chain = _causes(error)
    kinds: tuple[tuple[str, Any], ...] = (
        ("gated", errors.GatedRepoError),
        ("missing", errors.RepositoryNotFoundError),
        ("revision", errors.RevisionNotFoundError),
        ("file", errors.RemoteEntryNotFoundError),
        ("broken", httpx2.RemoteProtocolError),
        ("network", (httpx2.ConnectError, httpx2.TimeoutException, httpx2.NetworkError)),
        ("status", errors.HfHubHTTPError),
    )
    for kind, classes in kinds:
        if any(isinstance(one, classes) for one in chain):
            return {"kind": kind, "text": text, "status": status}
    disk = next((one for one in chain if getattr(one, "errno", 0) == errno.ENOSPC), None)
    if disk is not None:
        return {"kind": "disk", "text": text}
    if "Consistency check failed" in text:
        return {"kind": "broken", "text": text}
    return {"kind": "other", "text": f"{type(error).__name__}: {text}"}


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


# Outlines


def _outline(request: Mapping[str, Any]) -> None:
    """List a repository, and write the outline of the part that is needed."""
    from filelock import FileLock
    from huggingface_hub import HfApi, constants

    from backends.hub.cache import LISTING, Wanted
    from backends.hub.choice import index_in, small_files, weight_files
    from backends.hub.names import HubName

    name, without = HubName(**request["name"]), frozenset(request["without"])
    wanted = Wanted(option=request["option"], name=name, kind=request["kind"], without=without)
    info = HfApi().model_info(
        name.repo,
        revision=name.revision,
        files_metadata=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    listing = {file.rfilename: file.size or 0 for file in info.siblings or []}
    outline = wanted.outline(info.sha)
    outline.mkdir(parents=True, exist_ok=True)
    with FileLock(outline.with_suffix(".lock")):
        if (index := index_in(listing)) and wanted.kind == "pipeline":
            _link(wanted, info.sha, [index])
        scope = wanted.scope(listing, outline)
        if scope is None:
            raise Refusal(kind="content", files=sorted(listing))
        _link(wanted, info.sha, small_files(scope, listing))
        weights = weight_files(scope, listing)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(lambda file: _write_stub(wanted, info.sha, file, listing[file]), weights))
        _write(outline / LISTING, json.dumps(listing).encode())
        ref = wanted.folder / "refs" / name.revision
        if name.revision != info.sha:
            ref.parent.mkdir(parents=True, exist_ok=True)
            _write(ref, info.sha.encode())
        wanted.snapshot(info.sha).mkdir(parents=True, exist_ok=True)


def _link(wanted: Any, commit: str, files: Sequence[str]) -> None:
    """Download small files into the hub's cache, and link them into the outline."""
    from huggingface_hub import hf_hub_download

    def fetch(file: str) -> None:
        path = hf_hub_download(wanted.name.repo, file, revision=commit)
        target = wanted.outline(commit) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            target.symlink_to(path)

    with ThreadPoolExecutor(2 * CONNECTIONS) as pool:
        list(pool.map(fetch, files))


def _write_stub(wanted: Any, commit: str, file: str, size: int) -> None:
    """Write a sparse file of `size` bytes that begins as the hub's does, or link the whole one."""
    target, whole = wanted.outline(commit) / file, wanted.snapshot(commit) / file
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    if whole.is_file():
        target.symlink_to(whole)
        return
    unfinished = target.with_name(f".{target.name}.new")
    with unfinished.open("wb") as output:
        output.write(_header(wanted.name.repo, commit, file, size))
        output.truncate(size)
    unfinished.rename(target)


def _header(repo: str, commit: str, file: str, size: int) -> bytes:
    """Return the first bytes of a file of weights, with its whole header; none of a pickle's."""
    if file.endswith(".gguf"):
        return _first_bytes(repo, commit, file, min(size, GGUF_BYTES))
    if not file.endswith((".safetensors", ".sft")):
        return b""
    first = _first_bytes(repo, commit, file, min(size, FIRST_BYTES))
    length = 8 + struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
    if length > min(size, 100 * FIRST_BYTES):
        return first  # no safetensors file; its reader says so
    return first[:length] if length <= len(first) else _first_bytes(repo, commit, file, length)


def _first_bytes(repo: str, commit: str, file: str, count: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {
        **build_hf_headers(),
        "Range": f"bytes=0-{max(count - 1, 0)}",
        "Accept-Encoding": "identity",
    }
    url, found = hf_hub_url(repo, file, revision=commit), b""
    options = {"follow_redirects": True, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    with get_session().stream("GET", url, headers=headers, **options) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= count:
                break
    return found[:count]


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.rename(path)


# Downloads


def _download(request: Mapping[str, Any]) -> None:
    """Download files into the hub's cache. What was begun before is continued."""
    from huggingface_hub import constants

    files = [
        (each["repo"], each["commit"], file, size)
        for each in request["repositories"]
        for file, size in each["files"].items()
    ]
    total = sum(size for *_, size in files)
    _require_space(Path(constants.HF_HUB_CACHE), total, files)
    with _told_progress(total) as meter, ThreadPoolExecutor(CONNECTIONS) as pool:
        jobs = [pool.submit(_fetch, repo, commit, file, meter) for repo, commit, file, _ in files]
        try:
            for job in jobs:
                job.result()
        # whatever ends one download, an interruption too: those that wait must not begin
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(repo: str, commit: str, file: str, meter: type["_Meter"]) -> None:
    """Download a file into the hub's cache, from where an earlier attempt ended.

    huggingface_hub begins anew in each process. So the file is written here, into the place where
    that library looks before it downloads.
    """
    from filelock import FileLock
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(repo, file, revision=commit)
    facts = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    folder = f"models--{repo.replace('/', '--')}"
    blob = Path(constants.HF_HUB_CACHE) / folder / "blobs" / (facts.etag or "")
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder / f"{facts.etag}.lock"
    is_small_enough = facts.size is not None and facts.size <= constants.MAX_HTTP_DOWNLOAD_SIZE
    if facts.etag and is_small_enough:
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not blob.exists():
                _continue(url, facts, blob, meter)
    hf_hub_download(repo, file, revision=commit, tqdm_class=meter)


def _continue(url: str, facts: Any, blob: Path, meter: type["_Meter"]) -> None:
    """Download the rest of a blob. One that was continued must have the hash of its ETag."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers()
    if urlsplit(facts.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is the hub's alone
    partial = blob.with_name(f"{blob.name}.continued.incomplete")
    begun = partial.stat().st_size if partial.exists() else 0
    if begun > facts.size:
        partial.unlink()
        begun = 0
    with partial.open("ab") as output:
        http_get(
            facts.location,
            output,
            resume_size=begun,
            headers=headers,
            expected_size=facts.size,
            displayed_filename=blob.name,
            tqdm_class=meter,
        )
    if begun and len(blob.name) == SHA256_LENGTH and _sha256(partial) != blob.name:
        partial.unlink()
        raise OSError("Consistency check failed: its parts do not belong together")
    partial.rename(blob)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _require_space(cache: Path, total: int, files: Sequence[tuple[str, str, str, int]]) -> None:
    """Raise OSError unless what is still to come fits on the disk."""
    cache.mkdir(parents=True, exist_ok=True)
    folders = {cache / f"models--{repo.replace('/', '--')}" / "blobs" for repo, *_ in files}
    begun = sum(file.stat().st_size for folder in folders for file in folder.glob("*.incomplete"))
    free = shutil.disk_usage(cache).free
    if total - begun > free:
        raise Refusal(kind="disk", needed=total - begun, free=free)


class _Meter:
    """What huggingface_hub takes for a progress bar: it counts the bytes of all files together."""

    total_done = 0
    lock = threading.Lock()

    def __init__(self, *args: Any, initial: float | None = 0, **kwargs: Any) -> None:
        self.update(initial)

    def update(self, count: float | None = 1) -> None:
        with self.lock:
            _Meter.total_done += int(count or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None: ...

    def set_postfix_str(self, *args: object, **kwargs: object) -> None: ...

    def set_description_str(self, *args: object, **kwargs: object) -> None: ...


@contextlib.contextmanager
def _told_progress(total: int) -> Iterator[type[_Meter]]:
    """Tell the parent how many of `total` bytes are here, until the block ends."""
    is_over = threading.Event()

    def tell() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(TELL_EVERY_S)
            _say({"bytes": min(_Meter.total_done, total), "of": total})

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield _Meter
    finally:
        is_over.set()
        teller.join(timeout=5)


if __name__ == "__main__":
    main()
