"""Find or download what names on a hub mean. Imports no torch.

An existing path is never looked for on a hub. What is in the local cache is used as it is. All
network use is in a process of its own (backends/hub/worker.py).
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from backends.errors import ConfigError
from backends.hub.cache import Found, Wanted, find
from backends.hub.choice import SMALL
from backends.hub.names import DEFAULT_REVISION, WEIGHT_SUFFIXES

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import backends.hub.worker as it"
TellBytes = Callable[[int, int], None]
"""Takes the bytes that are here and the bytes of all files."""
_BESIDE_A_FILE = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
"""Components that a single file may lack."""


def locate(wanted: Wanted, *, offline: bool) -> Found:
    """Return the files on this machine, or their outline. ConfigError says why there is none."""
    found = find(wanted)
    if offline and (found is None or found.listing):  # an outline lacks weights
        raise ConfigError(
            f"{_given(wanted)} is not in the cache {constants.HF_HUB_CACHE}, and this host is "
            f"offline. Run `{download_command(wanted)}` while online, or give a path."
        )
    if found is None:
        _run_worker(
            {
                "do": "outline",
                "name": {
                    "repo": wanted.name.repo,
                    "revision": wanted.name.revision,
                    "path": wanted.name.path,
                },
                "option": wanted.option,
                "kind": wanted.kind,
                "without": sorted(wanted.without),
            },
            lambda done, total: None,
            wanted,
        )
        found = find(wanted)
    if found is None:
        raise ConfigError(
            f"{_given(wanted)} was listed, but its files are not in {constants.HF_HOME}. Remove "
            f"{wanted.outline('').parent} there and try again."
        )
    return found


def download(files: Iterable[tuple[Found, Mapping[str, int]]], tell: TellBytes) -> None:
    """Download files, name -> bytes, of found repositories. ConfigError says what to do."""
    parts = [(found, missing) for found, missing in files if missing]
    if not parts:
        return
    request = {
        "do": "download",
        "repositories": [
            {"repo": found.wanted.name.repo, "commit": found.commit, "files": dict(missing)}
            for found, missing in parts
        ],
    }
    _run_worker(request, tell, parts[0][0].wanted)


def download_command(wanted: Wanted) -> str:
    """Return the command that downloads what is wanted into the cache."""
    name, options = wanted.name, ""
    if wanted.option == "checkpoint_config":
        parts = (part for part in _BESIDE_A_FILE if part not in wanted.without)
        patterns = [f"*{suffix}" for suffix in SMALL[:3]]
        patterns += (f"{part}/*.safetensors" for part in parts)
        options = "".join(f' --include "{pattern}"' for pattern in patterns)
    elif name.path and not name.path.endswith((*WEIGHT_SUFFIXES, ".json")):
        options = f' --include "{name.path}/*"'
    elif name.path:
        options = f" {name.path}"
    revision = f" --revision {name.revision}" if name.revision != DEFAULT_REVISION else ""
    return f"hf download {name.repo}{options}{revision}"


def size_text(done: int | None, total: int) -> str:
    """Return '3.1 of 6.9 GB', or '6.9 GB' without `done`."""
    unit, name = next(
        ((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if total >= unit), (1e3, "kB")
    )
    begun = "" if done is None else f"{done / unit:.1f} of "
    return f"{begun}{total / unit:.1f} {name}"


def _given(wanted: Wanted) -> str:
    return f"--{wanted.option}={wanted.name}"


def _run_worker(request: Mapping[str, Any], tell: TellBytes, wanted: Wanted) -> None:
    """Run the request in a process of its own. ConfigError says why it failed."""
    last = (0, 0)
    with subprocess.Popen(
        [sys.executable, "-c", f"{PROGRAM}; it.main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the launcher, with which this ends
    ) as worker:
        try:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            for line in worker.stdout:
                message = json.loads(line)
                if "error" in message:
                    raise _error(message["error"], wanted, *last)
                if message.get("done"):
                    return
                last = message["bytes"], message["of"]
                tell(*last)
            said = (worker.stderr.read().strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(
                f"{_given(wanted)} cannot be downloaded: the process that does it ended "
                f"({said[:200]}). Try again; what is here already is kept."
            )
        finally:
            worker.kill()


def _error(facts: Mapping[str, Any], wanted: Wanted, done: int, total: int) -> ConfigError:
    """Return the error in one line: what was given, what is wrong, and what to do."""
    words = _WORDS.get(facts["kind"], _WORDS["other"])
    name = wanted.name
    listed = facts.get("files", [])
    values = {
        "given": _given(wanted),
        "repo": name.repo,
        "revision": name.revision,
        "path": name.path,
        "hub": constants.ENDPOINT,
        "cache": constants.HF_HUB_CACHE,
        "text": facts.get("text", ""),
        "so_far": size_text(done, total) if total else "the list of its files",
        "command": download_command(wanted),
        "needed": size_text(None, facts.get("needed", 0)),
        "free": size_text(None, facts.get("free", 0)),
        "holds": ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "") or "nothing",
        "needs": _NEEDS[wanted.kind],
    }
    if facts["kind"] == "disk" and "needed" not in facts:
        words = _WORDS["full"]
    return ConfigError(words.format(**values))


_NEEDS = {
    "pipeline": "a model_index.json (diffusers layout) or the name of one file in it",
    "component": "a config.json, or the name of one file of weights in it",
    "file": "a file of weights of that name",
}
_WORDS = {
    "gated": (
        "{given} is gated on {hub}. Accept its terms at {hub}/{repo} with your account, then set "
        "HF_TOKEN to that account's token, or run `hf auth login`."
    ),
    "missing": (
        "{given} is neither a path on this machine nor a model on {hub} that can be read with "
        "this token. Correct the name; for a private model set HF_TOKEN, or run `hf auth login`."
    ),
    "revision": (
        "{given}: {repo} has no revision {revision!r} on {hub}. Give a branch, tag or commit that "
        "it has, or leave @{revision} out."
    ),
    "file": (
        "{given}: {repo} lost a file on {hub} while it was read ({text}). Try again, or give "
        "another revision."
    ),
    "content": "{given} is not usable: it needs {needs}, and {repo} holds: {holds}.",
    "choice": "{text}",
    "network": (
        "{given} is not on this machine, and {hub} cannot be reached ({text}). Check the network, "
        "HF_ENDPOINT and proxies; or run `{command}` where it can be reached and copy {cache}; or "
        "give a path."
    ),
    "broken": (
        "{given}: the download broke off at {so_far} ({text}). Start again: it goes on from there."
    ),
    "status": "{given}: {hub} answered with an error ({text}). Try again later, or give a path.",
    "disk": (
        "{given} needs {needed} more in {cache}, where {free} are free. Free some space, or set "
        "HF_HOME to a folder on a larger disk."
    ),
    "full": (
        "{given}: the disk of {cache} is full ({text}). Free some space and start again: it goes "
        "on from there; or set HF_HOME to a folder on a larger disk."
    ),
    "other": "{given} cannot be downloaded: {text}. Try again, or give a path.",
}
