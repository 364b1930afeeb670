"""Read and check model_table.yaml, the only list of what is supported. Imports no torch.

A wrong table raises a ConfigError that names the line.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import yaml

from backends import BACKEND_NAMES
from backends.errors import ConfigError, UnsupportedError
from backends.yaml_nodes import YamlNodes

TABLE_PATH = Path(__file__).resolve().parent.parent / "model_table.yaml"
FEATURES = (
    "lora",
    "controlnet",
    "ip_adapter",
    "inpainting",
    "quantization",
    "gguf",
    "compile",
    "offload",
    "compel",
    "step_cache",
)
ALWAYS_USED = ("model", "seed", "scheduler", "warmup_steps", "quality")
"""Fields of a request that are no arguments of a pipeline's call."""
Status = Literal["tested", "untested", "unsupported"]
GENERIC = "generic"
"""--type of a pipeline class without a row. All facts are read (backends/files/generic.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Whether one combination works. `reason` says why not, in words for the user."""

    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """One backend of a model type: its own status, and one cell per feature."""

    cell: Cell
    features: Mapping[str, Cell]


CHECKPOINT_SIGNS = frozenset({"is", "words"})
"""Keys of a row of ModelSpec.checkpoints that say which checkpoints it is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Facts about one model type. Code reads these instead of comparing names."""

    name: str
    title: str  # for messages and docs
    pipeline: str  # diffusers class
    denoiser: Literal["unet", "transformer"]  # its attribute on the pipeline; any of a generic type
    output: Literal["image", "video"]
    returns_latents: bool  # clients get the latents too
    latents: Literal["spatial", "packed", "video"]  # layout during denoising
    height: int  # default size in pixels of the result
    width: int
    num_inference_steps: int  # default
    guidance_scale: float  # default
    backends: Mapping[str, BackendSpec]  # in order of preference
    blocks: tuple[str, ...] = ()  # a transformer's ModuleLists of blocks, in order of execution
    # The pipeline multiplies given latents by scheduler.init_noise_sigma.
    scales_initial_latents: bool = True
    flow_matching: bool = False  # takes flow-matching samplers
    size_multiple: int = 8  # height and width must be multiples of this, in pixels
    upscale: int = 1  # output side / input side
    # cfg: two halves; distilled: the scale is an input of the model; frame_ramp: svd's, per frame;
    # three: image and text have a scale each, and a batch has three parts.
    guidance: Literal["cfg", "distilled", "frame_ramp", "three"] = "cfg"
    # Denoiser calls per step with guidance on. 1: both halves as one batch; 2: one after the other.
    guidance_calls: int = 1
    guidance_argument: str = "guidance_scale"  # the call's argument for the scale
    empty_negative: str = ""  # passed when the call needs a negative prompt and none was given
    # list: pipeline and denoiser take a list with one entry per image instead of one tensor.
    input_layout: Literal["tensor", "list"] = "tensor"
    # A row of a batch equals the same image alone (tested), so several jobs may share a call.
    is_batchable: bool = False
    num_frames: int = 1  # default
    frames_per_s: int = 7  # default speed of a video
    max_prompt_tokens: int = 77  # tokens of a prompt that reach the model
    # Sampler where the checkpoint has none of its own: a single file, or a replaced denoiser.
    scheduler: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Default dtype on a GPU that supports it, and the VAE's if it always differs.
    variant: Literal["fp16", "bf16"] = "fp16"
    vae_variant: Literal["", "fp32"] = ""
    requires: tuple[str, ...] = ("prompt",)  # inputs that every request must bring
    images: int = 0  # most images that a request may bring as `image`: to edit, or as references
    # least: pixels on each side of such an image; shape: most times that one side may be longer.
    image_limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    # Fixed extra arguments of the pipeline call.
    call: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    components: tuple[str, ...] = ()  # loaded separately unless the checkpoint folder holds them
    # Other pipeline classes with the same components, whose checkpoints this row also runs.
    also: tuple[str, ...] = ()
    # What a checkpoint must match (backends/files/fit.py). denoiser, vae: class names.
    # channels: [n, m], the denoiser has n * latent channels + m inputs. masked: the same of one
    # that reads a mask. text: config field -> text encoder widths that add up to it. is: config
    # fields with one allowed value. sign: a field that distinguishes types of the same class.
    # optional: components that may be absent.
    fits: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    single_file: bool = False  # the checkpoint may be one file: its denoiser, or more of it
    # Text encoder -> prefix of its tensors in such a file.
    file_encoders: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Name of a tensor in such a file -> hub repository with its configuration; "" for any file.
    configuration: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Title -> checkpoints with defaults of their own: recognised by `is` (configuration field ->
    # value) or one of `words` in their names (backends/files/defaults.py); the rest are facts.
    checkpoints: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Pipeline and model class, and the call's argument for the image.
    controlnet: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Text encoder -> the states that Compel reads: last or penultimate (+ pooled), or pooled.
    compel: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Classes of the image encoder and its processor.
    ip_adapter: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Checkpoint inside the repository, used without --checkpoint, and its own defaults.
    demo: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Further denoisers that run in other steps, such as a prior before the denoiser.
    other_denoisers: tuple[str, ...] = ()
    # The request fields that become the call's arguments, of a class that runs as diffusers has it:
    # its own timesteps, guidance and decoding. Empty: the StepDriver runs it from and to latents.
    takes: tuple[str, ...] = ()
    # Of a generic type only: the call's arguments with their defaults.
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # num_frames must be 1 more than a multiple of this: a latent frame of the VAE holds so many.
    frame_step: int = 1
    # Latent frames of which the video is made piece by piece; 0: in one piece.
    latent_chunk: int = 0
    # Found in the checkpoint: request field -> the least and the largest value that it allows.
    extent: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    # Found in the checkpoint: channels of the VAE's latents, and pixels on a side of one of them; 0
    # where it does not say.
    latent_channels: int = 0
    latent_pixels: int = 8
    # Found in the checkpoint: widths of prompt embeddings and of pooled ones, as far as it says.
    embeds_widths: tuple[int | None, int | None] = (None, None)
    # Found in the checkpoint: the denoiser itself reads the mask and the masked image.
    reads_mask: bool = False
    # Found in the checkpoint: its scheduler's configuration; empty where it has none.
    sampler: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Of a generic type only: what its class knows of the checkpoint (call_rules.py).
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Found in the checkpoint: its own class, where that is one of `also` or runs in the StepDriver.
    own: "ModelSpec | None" = None

    @property
    def is_generic(self) -> bool:
        """Return whether there is no row: all facts were read from the checkpoint."""
        return self.name == GENERIC

    @property
    def runs_as_is(self) -> bool:
        """Return whether the pipeline is called as diffusers has it (generic_run.py)."""
        return self.is_generic or bool(self.takes)

    @property
    def sizes_by_image(self) -> bool:
        """Return whether an image that every request must bring decides the size of the result,
        unless the request does.
        """
        return self.runs_as_is and "image" in self.requires

    def serving(self, asked: Collection[str]) -> "ModelSpec":
        """Return the facts by which a request with these fields runs: those of the checkpoint's own
        class if it alone takes one of them, and takes all.
        """
        own, given = self.own, {*asked}
        if own is None or not given <= {*own.takes, *ALWAYS_USED}:
            return self
        needed = {"arguments", *(("image", "video") if self.is_of_another_class else ())}
        return own if needed & given and given >= {*own.requires} else self

    @property
    def is_of_another_class(self) -> bool:
        """Whether the checkpoint's own class is not the row's."""
        return self.own is not None and self.own.pipeline != self.pipeline

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Return the attributes of all denoisers on the pipeline."""
        return tuple(filter(None, (self.denoiser, *self.other_denoisers)))

    @property
    def has_halves(self) -> bool:
        """Return whether guidance is two halves, which two ranks can share."""
        return self.guidance in ("cfg", "frame_ramp")

    @property
    def has_clip_prompts(self) -> bool:
        """Whether CLIP alone reads its prompts, token by token, so that tokens can be weighed."""
        return bool(self.compel) and "pooled" not in self.compel.values()

    @property
    def most_images(self) -> int:
        """Return how many images `image` may hold; 0 if the pipeline takes none."""
        return max(self.images, int("image" in self.requires))

    def lengths_around(self, num_frames: int, latent_chunk: int | None = None) -> tuple[int, int]:
        """Return the longest video with no more than these frames, 0 if there is none, and the
        next longer one. latent_chunk: the request's.
        """
        step, chunk = self.frame_step, latent_chunk or self.latent_chunk
        frames_of_piece = (chunk - 1) * step + 1 if chunk else step

        def length(pieces: int) -> int:
            made = pieces * frames_of_piece
            return (made - 1) // step * step + 1 if chunk else made + 1

        pieces = num_frames // frames_of_piece + 1
        while length(pieces) > num_frames:
            pieces -= 1
        return max(length(pieces), 0), length(pieces + 1)

    def supports(self, backend: str, feature: str | None = None) -> Cell:
        """Return whether `backend` can run this type, or one feature of it."""
        row = self.backends.get(backend)
        if row is None:
            known = ", ".join(self.backends)
            return Cell(
                status="unsupported",
                reason=f"model type {self.name!r} has no backend {backend!r}. It has: {known}",
            )
        if feature is None or row.cell.status == "unsupported":
            return row.cell
        return row.features[feature]

    def require(self, backend: str, feature: str | None = None) -> None:
        """Raise UnsupportedError with the table's reason, unless the combination is available."""
        cell = self.supports(backend, feature)
        if cell.status == "unsupported":
            what = f"{feature} with backend {backend!r}" if feature else f"backend {backend!r}"
            others = [
                name
                for name in self.backends
                if self.supports(name, feature).status != "unsupported"
            ]
            advice = f" Works with: {', '.join(others)}." if others else ""
            raise UnsupportedError(
                f"{what} is not available for model type {self.name!r}: {cell.reason}.{advice}"
            )

    def default_backend(self, world_size: int) -> str:
        """Return `single` for one rank, else the first backend of the row that can run the type."""
        if world_size == 1:
            return "single"
        for name, row in self.backends.items():
            if name != "single" and row.cell.status != "unsupported":
                return name
        raise UnsupportedError(
            f"no backend runs model type {self.name!r} on {world_size} ranks. Use "
            "--nproc_per_node=1."
        )


class ModelTable(Mapping[str, ModelSpec]):
    """Model type name -> ModelSpec, in the order of the file."""

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self._specs = dict(specs)

    def __getitem__(self, name: str) -> ModelSpec:
        if name not in self._specs:
            close = difflib.get_close_matches(name.lower(), self._specs, n=1)
            advice = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"type={name!r} is not a model type.{advice} Allowed: {', '.join(self._specs)}; "
                f"and {GENERIC}, for a folder of any other pipeline class of diffusers."
            )
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs


def read_table(path: Path = TABLE_PATH) -> ModelTable:
    """Return the checked table. ConfigError('model_table.yaml, line 12: ...') if it is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the model table {path} cannot be read: {error.strerror}. Reinstall, or restore the "
            "file."
        ) from error
    return _parse(text, path.name)


@lru_cache(maxsize=1)
def _parse(text: str, name: str) -> ModelTable:
    """Parse with libyaml if PyYAML was built with it: ten times as fast."""
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{name}, line {line}: {error.problem}. Fix the YAML there.") from error
    return ModelTable(dict(_Reader(name).table(root)))


OWN_FACTS = frozenset(
    "title pipeline also checkpoints controlnet ip_adapter compel single_file configuration "
    "demo".split()
)
"""Facts about one pipeline class, which a row does not take from the row that it is like."""
Nodes = dict[str, yaml.Node]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Defaults:
    """What holds where a type's row says nothing else."""

    cells: Mapping[str, Mapping[str, Cell]]
    """Backend -> feature -> its cell."""
    without: Mapping[str, str]
    """Feature -> why a type lacks it whose row has no fact about it. `{title}` is the type's."""

    def of(self, values: Mapping[str, Any]) -> dict[str, Cell]:
        """Return the cells of the features about which these facts of a row say nothing."""
        can_inpaint = values.get("returns_latents") or "mask_image" in values.get("takes", ())
        facts = {**values, "inpainting": can_inpaint}
        return {
            feature: Cell(status="unsupported", reason=reason.format(title=values.get("title")))
            for feature, reason in self.without.items()
            if not facts.get(feature)
        }


class _Reader(YamlNodes):
    """Converts the nodes of the table to specs."""

    def table(self, root: yaml.Node | None) -> Iterator[tuple[str, ModelSpec]]:
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"{self.file_name}, line 1: the table must map model type names to their facts."
            )
        items = self.items(root)
        defaults = self._defaults(items.pop("defaults", None))
        rows: dict[str, tuple[Nodes, Nodes]] = {}
        for name, node in items.items():
            rows[name] = self._row(name, node, rows)
            yield name, self._spec(name, node, *rows[name], defaults)

    def _row(
        self, name: str, node: yaml.Node, earlier: Mapping[str, tuple[Nodes, Nodes]]
    ) -> tuple[Nodes, Nodes]:
        """Return (facts, features) of a row, with those of the row that it is `like`."""
        items = self.items(node)
        own = items.pop("features", None)
        features = self.items(own) if own is not None else {}
        like = items.pop("like", None)
        if like is None:
            return items, features
        if (other := self.value(like)) not in earlier:
            raise self.error(
                like, f"{name}.like={other!r} is no row above it. Allowed: {', '.join(earlier)}"
            )
        facts, others = earlier[other]
        shared = {key: value for key, value in facts.items() if key not in OWN_FACTS}
        return {**shared, **items}, {**others, **features}

    def _defaults(self, node: yaml.Node | None) -> _Defaults:
        """Read the `defaults` row: `features` for all backends, `backends` for single ones, and
        `without`.
        """
        items = self.items(node) if node is not None else {}
        self._require_keys(items, "defaults", ("features", "backends", "without"))
        shared = self._cells(items.get("features"), "defaults.features")
        cells = dict.fromkeys(BACKEND_NAMES, shared)
        rows = self.items(items["backends"]) if "backends" in items else {}
        self._require_keys(rows, "defaults.backends", BACKEND_NAMES)
        for backend, row in rows.items():
            where = f"defaults.backends.{backend}"
            found = self.items(row)
            self._require_keys(found, where, ("features",))
            cells[backend] = {**shared, **self._cells(found.get("features"), f"{where}.features")}
        reasons = self.items(items["without"]) if "without" in items else {}
        self._require_keys(reasons, "defaults.without", FEATURES)
        without = {key: self.fact("defaults.without", str, value) for key, value in reasons.items()}
        return _Defaults(cells=cells, without=without)

    def _require_keys(
        self, items: Mapping[str, yaml.Node], where: str, allowed: Sequence[str]
    ) -> None:
        for key, node in items.items():
            if key not in allowed:
                raise self.error(node, f"{where}.{key} is not known. Allowed: {', '.join(allowed)}")

    def _spec(
        self, name: str, node: yaml.Node, items: Nodes, features: Nodes, defaults: _Defaults
    ) -> ModelSpec:
        known = {fact.name: fact for fact in fields(ModelSpec)}
        values: dict[str, Any] = {"name": name}
        for key, value in items.items():
            if key not in known or key == "name":
                allowed = ", ".join(known)
                raise self.error(
                    value, f"{name}.{key} is not a fact of a model type. Allowed: {allowed}"
                )
            if key != "backends":
                values[key] = self.fact(f"{name}.{key}", known[key].type, value)
        self._require_checkpoints(items.get("checkpoints"), name, known)
        own = {**defaults.of(values), **self._read_cells(features, f"{name}.features")}
        cells = {backend: {**row, **own} for backend, row in defaults.cells.items()}
        values["backends"] = (
            self._backends(name, items["backends"], cells) if "backends" in items else None
        )
        needed = [
            key
            for key, fact in known.items()
            if fact.default is MISSING and fact.default_factory is MISSING
        ]
        missing = [key for key in needed if values.get(key) is None]
        if missing:
            raise self.error(node, f"{name} lacks {', '.join(missing)}. Add it")
        return ModelSpec(**values)

    def _require_checkpoints(
        self, node: yaml.Node | None, name: str, known: Mapping[str, Any]
    ) -> None:
        """Raise ConfigError unless each row has a sign and facts of a model type."""
        for title, row in (self.items(node) if node is not None else {}).items():
            where, items = f"{name}.checkpoints.{title}", self.items(row)
            if len(CHECKPOINT_SIGNS & items.keys()) != 1:
                raise self.error(row, f"{where} must have one of `is` and `words`")
            for key, value in items.items():
                if key not in CHECKPOINT_SIGNS and key not in known:
                    raise self.error(value, f"{where}.{key} is not a fact of a model type")
                if key not in CHECKPOINT_SIGNS:
                    self.fact(f"{where}.{key}", known[key].type, value)

    def _backends(
        self, name: str, node: yaml.Node, shared: Mapping[str, Mapping[str, Cell]]
    ) -> Mapping[str, BackendSpec]:
        """Read the rows of a type. shared: the cells that a row may override."""
        rows = {}
        for backend, row_node in self.items(node).items():
            if backend not in BACKEND_NAMES:
                raise self.error(
                    row_node,
                    f"{name}.backends.{backend} is not a backend. Allowed: "
                    f"{', '.join(BACKEND_NAMES)}",
                )
            items, where = self.items(row_node), f"{name}.backends.{backend}"
            own = self._cells(items.pop("features", None), f"{where}.features")
            untested = dict.fromkeys(FEATURES, Cell(status="untested"))
            rows[backend] = BackendSpec(
                cell=self._status(items, row_node, where),
                features=MappingProxyType({**untested, **shared[backend], **own}),
            )
        return MappingProxyType(rows)

    def _cells(self, node: yaml.Node | None, where: str) -> dict[str, Cell]:
        """Read feature -> cell: `tested`, `untested`, or a mapping with status and reason."""
        return self._read_cells(self.items(node) if node is not None else {}, where)

    def _read_cells(self, nodes: Nodes, where: str) -> dict[str, Cell]:
        cells = {}
        for feature, value in nodes.items():
            if feature not in FEATURES:
                raise self.error(
                    value, f"{where}.{feature} is not a feature. Allowed: {', '.join(FEATURES)}"
                )
            is_word = isinstance(value, yaml.ScalarNode)
            items = {"status": value} if is_word else self.items(value)
            cells[feature] = self._status(items, value, f"{where}.{feature}")
        return cells

    def _status(self, items: dict[str, yaml.Node], node: yaml.Node, where: str) -> Cell:
        values = {key: self.value(value) for key, value in items.items()}
        if set(values) - {"status", "reason"} or values.get("status") not in get_args(Status):
            raise self.error(
                node,
                f"{where} must say status: {' | '.join(get_args(Status))} (and a reason), not "
                f"{values}",
            )
        if values["status"] == "unsupported" and not values.get("reason"):
            raise self.error(
                node, f"{where} is unsupported but gives no reason. Say why: the user reads it"
            )
        return Cell(
            status=values["status"], reason=str(values.get("reason", "")).strip().rstrip(".")
        )
