"""What of a repository is on this machine: the hub's own cache, and outlines of files that are not
downloaded yet. Never uses the network. Imports no torch.

An outline has the names and sizes of a repository's files, its small files, and the header of each
file of weights without its tensors (a sparse file). So a model is checked, and its memory
estimated, before its weights are downloaded. The layout of the hub's cache is the published one:
refs/REVISION names a commit, snapshots/COMMIT/ holds links to its finished files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from backends.errors import ConfigError
from backends.hub.choice import (
    INDEX,
    Kind,
    Scope,
    chosen_weights,
    index_in,
    is_complete,
    scope_of,
    small_files,
    weight_files,
)
from backends.hub.names import HubName

LISTING = "listing.json"
"""Name and size of every file of a commit, in the folder of its outline."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an option needs of a repository."""

    option: str
    name: HubName
    kind: Kind
    without: frozenset[str] = frozenset()
    """Components whose weights come from elsewhere."""

    @property
    def folder(self) -> Path:
        """The repository's folder in the hub's cache."""
        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.repo.replace('/', '--')}"

    @property
    def commit(self) -> str | None:
        """The commit that the revision meant when it was last asked for; None if never."""
        ref = self.folder / "refs" / self.name.revision
        if ref.is_file():
            return ref.read_text(encoding="utf-8").strip()
        snapshots = self.folder / "snapshots"
        found = [path.name for path in snapshots.glob(f"{self.name.revision}*") if path.is_dir()]
        return found[0] if len(found) == 1 and len(self.name.revision) >= 7 else None

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def outline(self, commit: str) -> Path:
        home = Path(constants.HF_HOME) / "diffusion-launcher"
        return home / self.folder.name / commit

    def scope(self, files: Mapping[str, Any], root: Path) -> Scope | None:
        """Return what is needed of these files; `root` holds the index."""
        index = root / (index_in(files) or INDEX)
        content = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        try:
            return scope_of(
                files,
                content if isinstance(content, dict) else {},
                kind=self.kind,
                option=self.option,
                path=self.name.path,
                without=self.without,
            )
        except ConfigError as error:
            raise ConfigError(f"--{self.option}={self.name} {error}") from error


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a wanted repository is on this machine, whole or in outline."""

    wanted: Wanted
    commit: str
    root: Path
    scope: Scope
    listing: Mapping[str, int]
    """Name -> bytes of the whole repository; empty where everything needed is here."""

    @property
    def path(self) -> Path:
        """What the option gets instead of its name."""
        return self.root / self.scope.path if self.scope.path else self.root

    def missing(self, *, variant: str, denoiser: str) -> dict[str, int]:
        """Return the files to download, with their sizes, to compute in `variant`."""
        snapshot = self.wanted.snapshot(self.commit)
        weights = chosen_weights(self.scope, self.listing, variant=variant, denoiser=denoiser)
        needed = [*small_files(self.scope, self.listing), *weights]
        return {name: self.listing[name] for name in needed if not (snapshot / name).is_file()}


def find(wanted: Wanted) -> Found | None:
    """Return what is here: finished files, else an outline; None if the hub must be asked."""
    commit = wanted.commit
    if commit is None:
        return None
    snapshot, outline = wanted.snapshot(commit), wanted.outline(commit)
    here = {str(path.relative_to(snapshot)): 0 for path in snapshot.rglob("*") if path.is_file()}
    listing = read_listing(outline)
    # of a repository that was never listed, what is here must tell what is needed
    scope = wanted.scope(listing or here, outline if listing else snapshot)
    if scope is None:
        return None
    if is_complete(scope, here) and here.keys() >= set(small_files(scope, listing)):
        return Found(wanted=wanted, commit=commit, root=snapshot, scope=scope, listing={})
    needed = [*small_files(scope, listing), *weight_files(scope, listing)]
    if not listing or not all((outline / name).exists() for name in needed):
        return None
    return Found(wanted=wanted, commit=commit, root=outline, scope=scope, listing=listing)


def read_listing(outline: Path) -> dict[str, int]:
    file = outline / LISTING
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
