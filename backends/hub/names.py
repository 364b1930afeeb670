"""Names of models on a hub: ORG/NAME, ORG/NAME@REVISION and ORG/NAME/FILE. Imports no torch."""

import re
from dataclasses import dataclass

DEFAULT_REVISION = "main"
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})"
    r"(?:@(?P<revision>refs/pr/\d+|[A-Za-z0-9][A-Za-z0-9._-]*))?"
    r"(?:/(?P<path>[^@]+))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """A repository at a revision, and a file or folder in it."""

    repo: str
    revision: str = DEFAULT_REVISION
    path: str = ""
    """Empty for the whole repository."""

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"{self.repo}{revision}{'/' if self.path else ''}{self.path}"


def parse_name(text: str) -> HubName | None:
    """Return the name; None for what can only be a path."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text.split("/"):
        return None
    repo, path = found["repo"], (found["path"] or "").strip("/")
    if not path and repo.endswith(WEIGHT_SUFFIXES):
        return None  # models/mine.safetensors
    return HubName(repo=repo, revision=found["revision"] or DEFAULT_REVISION, path=path)
