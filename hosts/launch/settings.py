"""Every launch argument, declared once: the parser (hosts/launch/command_line.py), the README's
table and GET /settings come from these fields.

Imports no torch. Values are checked one by one here; what depends on several of them is checked in
hosts/launch/start_plan.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from backends import BACKEND_NAMES
from backends.autotune.candidates import QUALITIES
from backends.errors import ConfigError
from hosts.launch.parsers import (
    counts,
    endpoint,
    json_object,
    number,
    one_of,
    parse_switch,
    scales,
    scheduler,
    secret,
    weights,
    whole,
)

SECTIONS = (
    "start",
    "limits",
    "model",
    "adapters",
    "quantization",
    "compile",
    "memory",
    "asyncdiff",
    "distrifuser",
    "xdit",
    "several machines",
    "cluster",
)


def _option(
    default: Any,
    section: str,
    text: str,
    *,
    parse: Callable[[str], Any],
    aliases: Sequence[str] = (),
    pending: str = "",
    metavar: str = "",
    also: Sequence[str] = (),
) -> Any:
    """One launch argument. `pending`: why giving it is refused for now; `aliases`: further names,
    the clients' older ones.

    `also`: backends that read it besides the one its section is named after.
    """
    metadata = {
        "section": section,
        "text": text,
        "parse": parse,
        "aliases": tuple(aliases),
        "pending": pending,
        "metavar": metavar,
    }
    backends = (section, *also) if section in BACKEND_NAMES else ()
    return field(default=default, metadata={**metadata, "backends": backends})


def _switch(section: str, text: str, *, aliases: Sequence[str] = (), pending: str = "") -> Any:
    return _option(False, section, text, parse=parse_switch, aliases=aliases, pending=pending)


_PATHS: Callable[[str], str] = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that is fixed at launch. None means not given. Names are the customer's; '-' and
    '_' are equal.
    """

    type: str | None = _option(None, "start", "Model type, a row of model_table.yaml.", parse=str)
    port: int = _option(6000, "start", "HTTP port.", parse=whole(1, 65535))
    checkpoint: str | None = _option(
        None, "start", ("Folder in diffusers layout, or x.safetensors with its configuration in x/ "
                       "(sd1, sd2, sdxl, flux). None: the demo."),
        parse=_PATHS, aliases=("model",), metavar="PATH",
    )  # fmt: skip
    backend: str | None = _option(
        None, "start", ("Backend; auto predicts and tries, and is the default where several could "
                       "run and no option of one is given."),
        parse=one_of("auto", *BACKEND_NAMES),
    )  # fmt: skip
    quality: str = _option(
        "high", "start", ("For --backend=auto. exact: images as one rank makes them; high: or very "
                         "close; fast: any."),
        parse=one_of(*QUALITIES),
    )  # fmt: skip
    mode: str = _option(
        "auto", "start", ("latency: all ranks on each job; throughput: a job on each rank; auto: "
                          "by "
                         "the number of jobs that wait."),
        parse=one_of("latency", "throughput", "auto"),
    )  # fmt: skip
    max_batch: int = _option(
        4,
        "start",
        "Jobs that one rank does in one batch where that is quicker; 1 never, and neither does "
        "--mode=latency.",
        parse=whole(1, 64),
    )
    nproc_per_node: int | None = _option(
        None,
        "start",
        "Ranks on this machine; without it the visible GPUs, else 1.",
        parse=whole(1, 64),
    )
    host: str = _option("127.0.0.1", "start", "Address to listen on.", parse=str)
    master_port: int | None = _option(
        None,
        "start",
        "Port for the ranks' rendezvous; without it a free one.",
        parse=whole(1, 65535),
    )
    max_restarts: int = _option(
        3,
        "start",
        "How often in a row the ranks are started again; an image ends the row.",
        parse=whole(0, 1000),
    )
    state_dir: str | None = _option(
        None, "start", ("Folder where jobs and their images outlive the host; without it they "
                       "outlive only its ranks."),
        parse=_PATHS, metavar="DIR",
    )  # fmt: skip
    no_job_store: bool = _switch(
        "start", "Keep no jobs on disk: for a replica, whose gateway keeps them."
    )
    keep_results: int = _option(
        64,
        "start",
        "Jobs of POST /v1/jobs that are kept when they are over.",
        parse=whole(1, 100_000),
    )
    keep_results_mb: int = _option(
        256, "start", "Megabytes of images that are kept of them.", parse=whole(1, 10_000_000)
    )
    keep_results_hours: int = _option(
        0, "start", "Hours for which they are kept; 0 is any time.", parse=whole(0, 100_000)
    )
    drain_seconds: int = _option(
        1, "start", ("Seconds that the running job still has when the host is told to stop; those "
                    "that wait stay in --state_dir."),
        parse=whole(0, 86_400),
    )  # fmt: skip
    config: str | None = _option(
        None,
        "start",
        "YAML file with the same names; the command line wins.",
        parse=_PATHS,
        metavar="FILE",
    )
    image_dirs: str | None = _option(
        None,
        "start",
        "Folders, with ':' between, from which requests may name image files by path.",
        parse=_PATHS,
        metavar="DIR:DIR",
    )
    failure_timeout: int = _option(
        10,
        "start",
        "Seconds without a sign of life after which a rank counts as lost.",
        parse=whole(2, 3600),
    )
    api_key: str | None = _option(
        None, "start", ("Key that every request must bring as a bearer token; needed where --host "
                       "is not this machine alone."),
        parse=secret, metavar="KEY|@FILE",
    )  # fmt: skip
    queue_size: int = _option(
        48, "start", "Jobs that may wait; more are refused with 429.", parse=whole(1, 48)
    )
    max_job_seconds: int = _option(
        0,
        "start",
        "Longest time from a job's arrival to its end; 0 is any.",
        parse=whole(0, 1_000_000),
    )
    disconnect_grace: int = _option(
        5,
        "start",
        "Seconds after which the job of a client that went away is cancelled; 0 keeps it.",
        parse=whole(0, 86_400),
    )
    exit_with_parent: bool = _switch(
        "start", "End with the process that started this one, for programs that start a host."
    )
    log_format: str = _option(
        "text", "start", "Lines of the log: text or json.", parse=one_of("text", "json")
    )
    check: bool = _switch("start", "Print the resolved plan and exit without loading weights.")
    json: bool = _switch("start", "With --check or --list: print JSON.")
    list: bool = _switch("start", "Print the matrix of model types and backends and exit.")
    features: bool = _switch("start", "With --list: print the features of every combination too.")

    max_body_mb: int = _option(512, "limits", "Megabytes of one request.", parse=whole(1, 100_000))
    max_image_megapixels: int = _option(
        25, "limits", "Millions of pixels of one image in a request.", parse=whole(1, 178)
    )
    max_steps: int = _option(1000, "limits", "Sampling steps.", parse=whole(1, 1000))
    max_side: int = _option(8192, "limits", "Height and width in pixels.", parse=whole(8, 8192))
    max_frames: int = _option(512, "limits", "Frames of one video.", parse=whole(1, 512))
    max_images: int = _option(
        16,
        "limits",
        "Images that one request of OpenAI's or A1111's API may ask for.",
        parse=whole(1, 16),
    )
    max_prompt_chars: int = _option(
        20_000,
        "limits",
        "Characters of a prompt, and of a negative one.",
        parse=whole(1, 1_000_000),
    )
    rate_limit: int = _option(
        0,
        "limits",
        "POST requests in a minute from one client (one key, else one address); 0 is any number.",
        parse=whole(0, 1_000_000),
    )

    variant: str | None = _option(
        None,
        "model",
        "Compute type: fp16, bf16 or fp32; fp16 on CUDA and fp32 on the CPU without it.",
        parse=one_of("fp16", "bf16", "fp32"),
    )
    height: int | None = _option(
        None, "model", "Default height in pixels.", parse=whole(8, 8192, multiple=8)
    )
    width: int | None = _option(
        None, "model", "Default width in pixels.", parse=whole(8, 8192, multiple=8)
    )
    warm_up_steps: int | None = _option(
        None,
        "model",
        "Steps of a throw-away image after loading; for distrifuser also its synchronous steps "
        "(default 4).",
        parse=whole(0, 1000),
    )
    scheduler: dict[str, Any] | None = _option(
        None,
        "model",
        "Sampler: a name, or JSON with its settings.",
        parse=scheduler,
        metavar="NAME|JSON",
    )
    vae: str | None = _option(
        None, "model", "Replacement VAE: file or folder.", parse=_PATHS, metavar="PATH"
    )
    vae_config: str | None = _option(
        None,
        "model",
        "config.json of --vae; without it the checkpoint's.",
        parse=_PATHS,
        metavar="PATH",
    )
    unet: str | None = _option(
        None, "model", "Replacement UNet: file or folder.", parse=_PATHS, metavar="PATH"
    )
    unet_config: str | None = _option(
        None, "model", "config.json of --unet.", parse=_PATHS, metavar="PATH"
    )
    transformer: str | None = _option(
        None, "model", "Replacement transformer: file or folder.", parse=_PATHS, metavar="PATH"
    )
    transformer_config: str | None = _option(
        None, "model", "config.json of --transformer.", parse=_PATHS, metavar="PATH"
    )
    gguf_model: str | None = _option(
        None, "model", "Denoiser weights in GGUF.", parse=_PATHS, metavar="PATH"
    )
    compel: bool = _switch("model", "Prompt weights such as (red)1.3.")
    step_cache: str | None = _option(
        None,
        "model",
        "Skip parts of steps: first_block,0.08 or taylor,3 (transformers), deep,2 (UNets).",
        parse=str,
        metavar="KIND,N",
    )

    lora: dict[str, float] | None = _option(
        None, "adapters", 'LoRA files, JSON {"path": scale}.', parse=scales, metavar="JSON"
    )
    lora_dir: str | None = _option(
        None,
        "adapters",
        "Folders, with ':' between, from which requests may choose LoRAs.",
        parse=_PATHS,
        metavar="DIR:DIR",
    )
    control_net: dict[str, float] | None = _option(
        None,
        "adapters",
        'ControlNet folders or files, JSON {"path": scale}, or a path.',
        parse=scales,
        metavar="JSON|PATH",
    )
    control_net_config: str | None = _option(
        None, "adapters", "config.json of --control_net.", parse=_PATHS, metavar="PATH"
    )
    controlnet_scale: float | None = _option(
        None,
        "adapters",
        "Weight of every --control_net, in place of its own.",
        parse=number(-10, 10),
    )
    ip_adapter: dict[str, float] | None = _option(
        None,
        "adapters",
        'IP-Adapter files, JSON {"path": scale}; image_encoder/ beside them.',
        parse=scales,
        metavar="JSON",
    )
    image_scale: float | None = _option(
        None,
        "adapters",
        "Percent by which requests' images are scaled, unless they say it.",
        parse=number(1, 1000),
    )
    motion_adapter: str | None = _option(
        None, "adapters", "AnimateDiff motion adapter folder (ad).", parse=_PATHS, metavar="DIR"
    )
    motion_module: str | None = _option(
        None, "adapters", "AnimateDiff motion weights, one file (ad).", parse=_PATHS, metavar="PATH"
    )
    motion_config: str | None = _option(
        None, "adapters", "config.json of --motion_module.", parse=_PATHS, metavar="PATH"
    )
    motion_adapter_lora: dict[str, float] | None = _option(
        None,
        "adapters",
        "LoRA for the motion adapter.",
        parse=scales,
        aliases=("motion_lora",),
        metavar="JSON|PATH",
    )

    quantize_to: str | None = _option(
        None,
        "quantization",
        "Denoiser and text encoders: float8, int8, int4, int2, or bnb,int8 and the like.",
        parse=str,
        metavar="KIND",
    )
    quantize_unet_to: str | None = _option(
        None,
        "quantization",
        "Denoiser only.",
        parse=str,
        aliases=("quantize_unet", "quantize_transformer"),
        metavar="KIND",
    )
    quantize_encoder_to: str | None = _option(
        None,
        "quantization",
        "Text and image encoders only.",
        parse=str,
        aliases=("quantize_encoder",),
        metavar="KIND",
    )
    quantize_misc_to: str | None = _option(
        None,
        "quantization",
        "ControlNet and motion adapter only.",
        parse=str,
        aliases=("quantize_misc",),
        metavar="KIND",
    )
    quantize_vae: str | None = _option(
        None, "quantization", "VAE only.", parse=str, aliases=("quantize_vae_to",), metavar="KIND"
    )
    quantize_tokenizer: str | None = _option(
        None, "quantization", "Accepted: there is nothing to quantise.", parse=str, metavar="KIND"
    )
    quantize_scheduler: str | None = _option(
        None, "quantization", "Accepted: there is nothing to quantise.", parse=str, metavar="KIND"
    )

    compile_unet: bool = _switch(
        "compile", "Compile the denoiser.", aliases=("compile_transformer",)
    )
    compile_vae: bool = _switch(
        "compile", "Compile the VAE's decoder; every rank then decodes the whole image."
    )
    compile_text_encoder: bool = _switch(
        "compile", "Compile the text encoders.", aliases=("compile_encoder",)
    )
    compile_backend: str | None = _option(
        None, "compile", "Backend of torch.compile (inductor).", parse=str
    )
    compile_mode: str | None = _option(
        None,
        "compile",
        "Mode of torch.compile: reduce-overhead, max-autotune, max-autotune-no-cudagraphs.",
        parse=str,
    )
    compile_options: dict[str, Any] | None = _option(
        None,
        "compile",
        "Options of torch.compile; they win over a mode.",
        parse=json_object,
        metavar="JSON",
    )
    compile_fullgraph_off: bool = _switch("compile", "Allow graph breaks.")
    torch_cache_limit: int | None = _option(
        None, "compile", "Graphs kept per function (default 64).", parse=whole(0)
    )
    torch_accumulated_cache_limit: int | None = _option(
        None,
        "compile",
        "Graphs kept in all.",
        parse=whole(0),
        aliases=("torch_accumlated_cache_limit",),
    )
    torch_capture_scalar: bool = _switch("compile", "Capture scalar outputs.")

    enable_vae_tiling: bool = _switch("memory", "Decode large images in tiles.")
    enable_vae_slicing: bool = _switch("memory", "Decode batches one by one.")
    parallel_vae: bool | None = _option(
        None,
        "memory",
        "Decode each image on all ranks together; on if not given.",
        parse=parse_switch,
        aliases=("use_parallel_vae",),
    )
    enable_attention_slicing: bool = _switch(
        "memory", "Compute attention in slices (backends single and asyncdiff)."
    )
    xformers_efficient: bool = _switch(
        "memory", "xformers attention, if it is installed (backends single and asyncdiff)."
    )
    enable_model_cpu_offload: bool = _switch("memory", "Keep idle models in main memory.")
    enable_sequential_cpu_offload: bool = _switch("memory", "Keep idle layers in main memory.")
    enable_group_offload: bool = _switch(
        "memory", "Keep idle layers in main memory and fetch them ahead."
    )

    model_n: int | None = _option(
        None, "asyncdiff", "Number of denoiser segments.", parse=whole(1, 64)
    )
    stride: int | None = _option(
        None, "asyncdiff", "Run the denoiser every 1 or 2 steps.", parse=whole(1, 2)
    )
    time_shift: bool = _switch("asyncdiff", "Shift the timestep of stale segments.")
    warm_up: int | None = _option(
        None,
        "asyncdiff",
        "Synchronous steps at the start of each image (default 3).",
        parse=whole(0, 1000),
        aliases=("synced_steps",),
    )
    synced_percent: float | None = _option(
        None,
        "asyncdiff",
        "The same as a share of the steps; wins when above 0.",
        parse=number(0, 100),
    )
    segment_weights: tuple[float, ...] | None = _option(
        None, "asyncdiff", "Relative speed of each segment's rank.", parse=weights, metavar="W,W"
    )
    shard_weights: bool = _switch("asyncdiff", "Each rank keeps only its own segment's weights.")
    extrapolate: bool | None = _option(
        None,
        "asyncdiff",
        "Extrapolate stale values from the last two steps; on if not given where it comes closer "
        "(also distrifuser).",
        parse=parse_switch,
        also=("distrifuser",),
    )

    parallelism: str | None = _option(
        None,
        "distrifuser",
        "patch (default), naive_patch or tensor.",
        parse=one_of("patch", "naive_patch", "tensor"),
    )
    sync_mode: str | None = _option(
        None, "distrifuser", "How patches exchange (default corrected_async_gn).",
        parse=one_of(
            "corrected_async_gn", "stale_gn", "separate_gn", "sync_gn", "full_sync", "no_sync",
            "rotate",
        ),
    )  # fmt: skip
    split_scheme: str | None = _option(
        None, "distrifuser", "row, col or alternate.", parse=one_of("row", "col", "alternate")
    )
    patch_weights: tuple[float, ...] | None = _option(
        None, "distrifuser", "Relative speed of each patch's rank.", parse=weights, metavar="W,W"
    )
    no_cuda_graph: bool = _switch(
        "distrifuser", "Accepted for old clients; no CUDA graphs are used."
    )
    no_split_batch: bool = _switch("distrifuser", "Patches instead of the CFG split.")

    use_cfg_parallel: bool | None = _option(
        None,
        "xdit",
        "The two halves of guidance on two halves of the ranks (also asyncdiff).",
        parse=parse_switch,
        also=("asyncdiff",),
    )
    ulysses_degree: int | None = _option(
        None, "xdit", "Ranks over attention heads.", parse=whole(1, 64)
    )
    ring_degree: int | None = _option(
        None, "xdit", "Ranks in a ring over the sequence.", parse=whole(1, 64)
    )
    pipefusion_parallel_degree: int | None = _option(
        None, "xdit", "Stages of the denoiser.", parse=whole(1, 64)
    )
    num_pipeline_patch: int | None = _option(None, "xdit", "Patches in flight.", parse=whole(1, 64))
    attn_layer_num_for_pp: tuple[int, ...] | None = _option(
        None, "xdit", "Blocks of each stage.", parse=counts, metavar="N,N"
    )
    warmup_steps: int | None = _option(
        None,
        "xdit",
        "Synchronous steps of PipeFusion at the start of each image (default 1).",
        parse=whole(1, 1000),
    )
    data_parallel_degree: int | None = _option(
        None, "xdit", "Groups of ranks for several images.", parse=whole(1, 64)
    )
    tensor_parallel_degree: int | None = _option(
        None, "xdit", "Ranks over split weights.", parse=whole(1, 64)
    )
    use_teacache: bool = _switch("xdit", "Accepted for old clients; no cache is used.")
    use_fbcache: bool = _switch("xdit", "--step_cache=first_block by its older name.")
    use_fast_attn: bool = _switch("xdit", "Accepted for old clients; attention is always whole.")
    use_fp8_t5_encoder: bool = _switch(
        "xdit", "Accepted for old clients; --quantize_encoder_to does this."
    )
    no_use_resolution_binning: bool = _switch(
        "xdit", "Accepted for old clients; sizes are never changed."
    )
    max_sequence_length: int | None = _option(
        None,
        "xdit",
        "Accepted for old clients; prompts are as long as the pipeline allows.",
        parse=whole(1, 4096),
    )
    vae_parallel_size: int | None = _option(
        None,
        "xdit",
        "Accepted for old clients; all ranks decode, or each the whole.",
        parse=whole(0, 64),
    )

    nnodes: int = _option(1, "several machines", "Number of machines.", parse=whole(1, 64))
    node_rank: int = _option(0, "several machines", "Number of this machine.", parse=whole(0, 63))
    rdzv_endpoint: str | None = _option(
        None,
        "several machines",
        "Address of the first machine, as all reach it, and a free port there.",
        parse=endpoint,
        metavar="HOST:PORT",
    )
    node_timeout: int = _option(
        600,
        "several machines",
        "Seconds for which a machine waits for the others, at start and later.",
        parse=whole(5, 1_000_000),
    )

    engine: str = _option(
        "local", "cluster", ("ray: replicas of the host, on any node of a Ray cluster, behind one "
                            "gateway; local: one host."),
        parse=one_of("local", "ray"),
    )  # fmt: skip
    replicas: int | None = _option(
        None, "cluster", "Replicas at start; 1 if not given.", parse=whole(1, 1000)
    )
    min_replicas: int | None = _option(
        None, "cluster", "Fewest replicas; without it --replicas.", parse=whole(1, 1000)
    )
    max_replicas: int | None = _option(
        None, "cluster", "Most replicas; without it --replicas.", parse=whole(1, 1000)
    )
    jobs_per_replica: int = _option(
        4,
        "cluster",
        "Jobs for each replica, waiting and running, above which one more is started.",
        parse=whole(1, 1000),
    )
    idle_seconds: int = _option(
        300,
        "cluster",
        "Seconds for which fewer replicas must have been enough before one is stopped.",
        parse=whole(0, 1_000_000),
    )
    ray_address: str | None = _option(
        None,
        "cluster",
        "host:port of a Ray cluster to join; without it one is started on this machine.",
        parse=str,
        metavar="HOST:PORT",
    )
    deployments: dict[str, Any] | None = _option(
        None, "cluster", ("Several models, best in --config: name -> arguments. Requests say which "
                         "as `model`."),
        parse=json_object, metavar="JSON",
    )  # fmt: skip

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings from texts (command line) or YAML values, by canonical name. ConfigError names
        the argument and what is allowed.
        """
        return cls(
            **{name: _convert(option_fields()[name], value) for name, value in values.items()}
        )

    @property
    def given(self) -> dict[str, Any]:
        """What differs from the defaults, without secrets."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default and f.name != "api_key"
        }

    def options(self) -> dict[str, Any]:
        """All values by name, as the backends' planners take them."""
        return asdict(self)


def option_fields() -> dict[str, Field[Any]]:
    """Canonical name -> declaration, in the order of the table."""
    return {f.name: f for f in fields(Settings)}


def canonical_names() -> dict[str, str]:
    """Every accepted spelling with '_' -> canonical name."""
    return {
        spelling: name
        for name, f in option_fields().items()
        for spelling in (name, *f.metadata["aliases"])
    }


def _convert(declared: Field[Any], value: Any) -> Any:
    if value is None:
        return declared.default
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return declared.metadata["parse"](text)
    except ValueError as error:
        raise ConfigError(f"--{declared.name}={value} is not allowed. Allowed: {error}.") from error


def table() -> str:
    """The README's argument table, in Markdown."""
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for name, declared in option_fields().items():
        data = declared.metadata
        names = ", ".join(f"`--{spelling}`" for spelling in (name, *data["aliases"]))
        default = (
            "off"
            if declared.default is False
            else ""
            if declared.default is None
            else f"`{declared.default}`"
        )
        pending = f" Refused for now: {data['pending']}." if data["pending"] else ""
        lines.append(f"| {names} | {default} | {data['text'].replace('|', '/')}{pending} |")
    return "\n".join(lines) + "\n"
