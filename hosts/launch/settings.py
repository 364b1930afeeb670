"""Every launch argument, declared once as a line of a table: section, default, parser, text.

The command line's parser, docs/arguments.md and GET /settings derive from it. Values are checked
one by one here; hosts/launch/start_plan.py checks what depends on several of them. Imports no
torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import cache, partial
from typing import Any

from backends import BACKEND_NAMES, plan_module
from backends.errors import ConfigError
from backends.options import number, one_of, parse_switch, whole
from backends.plan import QUALITIES
from hosts.launch.option import (
    COMPILE_MODES,
    SECTIONS,
    Option,
    compile_backend,
    declare,
    declare_backend_option,
    endpoint,
    folder,
    folders,
    host_names,
    json_object,
    keys_file,
    networks,
    origins,
    path,
    paths,
    public_url,
    scales,
    scheduler,
    secret,
)

_common, _proxy, _jobs, _process, _limit = (
    partial(declare, name) for name in ("common", "proxies", "jobs", "process", "limits")
)
_model, _adapter, _quantize, _compile, _memory = (
    partial(declare, name) for name in ("model", "adapters", "quantization", "compile", "memory")
)
_machines, _cluster, _old = (partial(declare, name) for name in ("machines", "cluster", "old"))
_switch = parse_switch

_BackendOptions: Any = make_dataclass(
    "_BackendOptions",
    [
        (option.name, Any, declare_backend_option(backend, option))
        for backend in BACKEND_NAMES
        for option in plan_module(backend).OPTIONS
    ],
    frozen=True,
    slots=True,
    kw_only=True,
)


# fmt: off

SECRETS = ("api_key", "rdzv_key")
"""Settings that are shown nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(_BackendOptions):
    """Everything that is fixed at launch. None means not given. In names, '-' equals '_'.

    The options of single backends are inherited: they are declared and read in their own folders.
    """

    type: str | None = _common(
        None, str, "Model type: a row of model_table.yaml. Default: the one that --checkpoint fits."
    )
    checkpoint: str | None = _common(
        None, path, "Model: a folder in diffusers layout, one file (.safetensors, .ckpt or "
        ".gguf), or ORG/NAME[@REVISION][/FILE] of a model hub. Default: the demo model.",
        metavar="PATH|NAME", aliases=("model",))
    port: int = _common(6000, whole(1, 65535), "HTTP port.")
    host: str = _common(
        "127.0.0.1", str, "Address to listen on. Other machines can reach any but the loopback "
        "address, so that needs --api_key or --api_keys.")
    nproc_per_node: int | None = _common(
        None, whole(1, 64), "Ranks on this machine, one per GPU. Default: all visible GPUs, or 1 "
        "on the CPU.")
    backend: str | None = _common(
        None, one_of("auto", *BACKEND_NAMES), "Parallel method. `auto` (default) estimates and "
        "benchmarks the candidates at load time and takes the fastest.")
    quality: str | None = _common(
        None, one_of(*QUALITIES), "How close an image must be to that of one GPU, if its request "
        "names no quality: `exact` (the same; default), `high` (no visible difference) or `fast` "
        "(similar). A --backend or method that is named must meet it.")
    api_key: str | None = _common(
        None, secret, "Key that every request must send, as a bearer token or as the password of "
        "Basic authentication, or @FILE that holds it. Default: none.", metavar="KEY|@FILE")
    lora_dir: str | None = _common(
        None, folders, "Folders, separated by ':', from which requests may choose LoRAs. Default: "
        "none.", metavar="DIR:DIR")
    state_dir: str | None = _common(
        None, folder, "Folder where jobs, their images and measured plans survive the host. "
        "Default: a temporary folder that survives only the ranks.", metavar="DIR")

    api_keys: str | None = _proxy(
        None, keys_file, "File with a line `NAME KEY` for each client. Only the key that sent a "
        "job can see, follow and cancel it. Read again when it changes.", metavar="FILE")
    share_jobs: bool = _proxy(
        False, _switch, "With --api_keys: every key sees, follows and cancels all jobs.")
    public_url: str | None = _proxy(
        None, public_url, "URL at which clients reach the host. Links in answers begin with it, "
        "and requests for its name are served. Default: the URL of each request.", metavar="URL")
    allowed_hosts: tuple[str, ...] | None = _proxy(
        None, host_names, "Further host names, separated by ',', for which requests are served, "
        "such as those that a proxy passes on as Host.", metavar="NAME,NAME")
    allowed_origins: tuple[str, ...] | None = _proxy(
        None, origins, "Origins, separated by ',', of programs that run in a browser and may send "
        "requests: scheme, name and port, as in http://localhost:5001.", metavar="ORIGIN,ORIGIN")
    trusted_proxies: tuple[str, ...] | None = _proxy(
        None, networks, "Addresses or networks, separated by ',', of proxies whose "
        "X-Forwarded-For, -Proto, -Host and -Prefix are read.", metavar="ADDRESS,NETWORK")

    mode: str = _jobs(
        "auto", one_of("latency", "throughput", "auto"), "`latency`: all ranks work on each job. "
        "`throughput`: each rank has a job of its own. `auto`: by the number of waiting jobs.")
    max_batch: int = _jobs(
        4, whole(1, 64), "Largest batch a rank may form from waiting jobs, when batching is "
        "faster. 1 disables it, and so does --mode=latency.")
    queue_size: int = _jobs(48, whole(1, 48), "Waiting jobs above which new ones get HTTP 429.")
    max_job_seconds: int = _jobs(
        0, whole(0, 1_000_000), "Seconds from a job's arrival until it is cancelled. 0: no limit.")
    disconnect_grace: int = _jobs(
        5, whole(0, 86_400), "Seconds until the job of a disconnected client is cancelled. 0 keeps "
        "the job.")
    drain_seconds: int = _jobs(
        1, whole(0, 86_400), "Seconds the running job may go on after a stop signal. Waiting jobs "
        "stay in --state_dir.")
    no_job_store: bool = _jobs(
        False, _switch, "Keep no jobs on disk, for a replica whose gateway keeps them.")
    keep_results: int = _jobs(64, whole(1, 100_000), "Finished jobs of POST /v1/jobs to keep.")
    keep_results_mb: int = _jobs(
        256, whole(1, 10_000_000), "Megabytes of images of finished jobs to keep.")
    keep_results_hours: int = _jobs(
        0, whole(0, 100_000), "Hours to keep finished jobs. 0: no limit.")
    image_dirs: str | None = _jobs(
        None, folders, "Folders, separated by ':', whose image files requests may name by path. "
        "Default: none.", metavar="DIR:DIR")

    config: str | None = _process(
        None, path, "YAML file with arguments by name. The command line wins.", metavar="FILE")
    check: bool = _process(False, _switch, "Print the resolved plan and exit; load no weights.")
    list: bool = _process(False, _switch, "Print the matrix of model types and backends and exit.")
    features: bool = _process(
        False, _switch, "With --list: also print the features of each combination.")
    all: bool = _process(
        False, _switch, "With --list: also print the pipeline classes that run without a row.")
    json: bool = _process(False, _switch, "With --check or --list: print JSON.")
    master_port: int | None = _process(
        None, whole(1, 65535), "Accepted for old clients; has no effect.")
    max_restarts: int = _process(
        3, whole(0, 1000), "Consecutive restarts before giving up. A finished image resets the "
        "count.")
    spare_ranks: bool = _process(
        True, _switch, "Keep a spare process for each rank, with the libraries imported, so that "
        "lost ranks are back in seconds. Each takes about 300 MB of main memory.")
    failure_timeout: int = _process(
        10, whole(2, 3600), "Seconds without a heartbeat after which a rank counts as lost.")
    offline: bool = _process(
        False, _switch, "Never connect to a model hub: names are looked up in the local cache. "
        "HF_HUB_OFFLINE=1 does the same.")
    exit_with_parent: bool = _process(
        False, _switch, "End when the parent process ends, for programs that start a host.")
    log_format: str = _process("text", one_of("text", "json"), "Format of log lines: text or json.")

    max_body_mb: int = _limit(512, whole(1, 100_000), "Megabytes of a request body.")
    max_image_megapixels: int = _limit(25, whole(1, 178), "Megapixels of an image in a request.")
    max_steps: int = _limit(1000, whole(1, 1000), "Sampling steps.")
    max_side: int = _limit(8192, whole(8, 8192), "Pixels of height and of width.")
    max_frames: int = _limit(512, whole(1, 512), "Frames of a video.")
    max_images: int = _limit(16, whole(1, 16), "Images per request of the OpenAI and A1111 APIs.")
    max_prompt_chars: int = _limit(
        20_000, whole(1, 1_000_000), "Characters of a prompt, and of a negative prompt.")
    rate_limit: int = _limit(
        0, whole(0, 1_000_000), "POST requests per minute from one client (one key of --api_keys, "
        "else one address). 0: no limit.")

    variant: str | None = _model(
        None, one_of("fp16", "bf16", "fp32"), "Compute dtype: fp16, bf16 or fp32. Default: on "
        "GPUs bf16 for types that are published in it, where the GPU has it, else fp16; on the CPU "
        "fp32.")
    height: int | None = _model(
        None, whole(8, 8192, multiple=8), "Image height in pixels where a request has none. "
        "Default: the model type's.")
    width: int | None = _model(
        None, whole(8, 8192, multiple=8), "Image width in pixels where a request has none. "
        "Default: the model type's.")
    scheduler: dict[str, Any] | None = _model(
        None, scheduler, "Sampler: a name such as euler, or JSON with its settings. Default: the "
        "checkpoint's.", metavar="NAME|JSON")
    prewarm_steps: int | None = _model(
        None, whole(0, 1000), "Steps of a throw-away image after loading, which pays for first-use "
        "costs. Default: 1 with torch.compile or asyncdiff, else 0.")
    warmup_steps: int | None = _model(
        None, whole(0, 1000), "Synchronous steps at the start of each image, for methods that "
        "reuse values of the previous step. Default: 3 (asyncdiff), 4 (distrifuser), 1 "
        "(PipeFusion, at least 1).", aliases=("synced_steps", "warm_up"))
    models: tuple[str, ...] | None = _model(
        None, paths, "Several models in place of --checkpoint, loaded when a request names them: a "
        "folder of them, or a list separated by ',' of what --checkpoint takes.",
        metavar="FOLDER|PATH,NAME")
    models_memory: int | None = _model(
        None, whole(0, 1_000_000), "Gigabytes of main memory in which models of --models stay that "
        "are not in use; the others are loaded again. Default: what is free.")
    checkpoint_config: str | None = _model(
        None, path, "Configuration of a single-file --checkpoint: a diffusers folder without "
        "weights, or ORG/NAME. Default: the folder NAME beside the file, else what the model hub "
        "has for its architecture.", metavar="DIR|NAME")
    vae: str | None = _model(None, path, "Replacement VAE: a file or a folder.", metavar="PATH")
    vae_config: str | None = _model(
        None, path, "config.json of a --vae file. Default: the checkpoint's.", metavar="PATH")
    unet: str | None = _model(None, path, "Replacement UNet: a file or a folder.", metavar="PATH")
    unet_config: str | None = _model(
        None, path, "config.json of a --unet file. Default: the checkpoint's.", metavar="PATH")
    transformer: str | None = _model(
        None, path, "Replacement transformer: a file or a folder.", metavar="PATH")
    transformer_config: str | None = _model(
        None, path, "config.json of a --transformer file. Default: the checkpoint's.",
        metavar="PATH")
    gguf_model: str | None = _model(
        None, path, "Replacement denoiser weights in GGUF format.", metavar="PATH")
    compel: bool = _model(False, _switch, "Read weights in prompts, such as (red)1.3, with Compel.")
    step_cache: str | None = _model(
        None, str, "Skip steps: `prediction,2` computes every 2nd step. Or skip most blocks of "
        "steps: `deep,2` (UNets) and `taylor,3` (transformers) compute every 2nd or 3rd step "
        "whole, `first_block,0.08` (transformers) skips while the first block changes by less. "
        "Default: off.",
        metavar="KIND,N")

    lora: dict[str, float] | None = _adapter(
        None, scales, 'LoRA files to load: JSON {"path": scale}.', metavar="JSON")
    control_net: dict[str, float] | None = _adapter(
        None, scales, 'ControlNets: JSON {"file or folder": scale}, or one path.',
        metavar="JSON|PATH")
    control_net_config: str | None = _adapter(
        None, path, "config.json of a --control_net file.", metavar="PATH")
    controlnet_scale: float | None = _adapter(
        None, number(-10, 10), "Scale of every ControlNet, instead of the one beside its path.")
    ip_adapter: dict[str, float] | None = _adapter(
        None, scales, 'IP-Adapter files: JSON {"path": scale}, with image_encoder/ beside them.',
        metavar="JSON")
    upscalers: tuple[str, ...] | None = _adapter(
        None, paths, "ESRGAN upscalers (x4plus, anime, UltraSharp, ...): files separated by ',', "
        "or a folder of them. Requests name one by its file name without the ending.",
        metavar="DIR|FILE,FILE")
    image_scale: float | None = _adapter(
        None, number(1, 1000), "Size in percent to which input images are scaled, unless the "
        "request has its own. Default: 100.")
    motion_adapter: str | None = _adapter(
        None, path, "AnimateDiff motion adapter: a folder (ad).", metavar="DIR")
    motion_module: str | None = _adapter(
        None, path, "AnimateDiff motion weights: one file (ad).", metavar="PATH")
    motion_config: str | None = _adapter(
        None, path, "config.json of --motion_module (ad).", metavar="PATH")
    motion_adapter_lora: dict[str, float] | None = _adapter(
        None, scales, 'LoRA of the motion adapter: JSON {"path": scale}, or one path (ad).',
        metavar="JSON|PATH", aliases=("motion_lora",))

    quantize_to: str | None = _quantize(
        None, str, "Weights of denoiser and text encoders: float8, int8, int4, int2, `bnb,int8` or "
        "`bnb,int4,COMPUTE,STORAGE,nf4`. Default: --variant.", metavar="KIND")
    quantize_unet_to: str | None = _quantize(None, str, "The same for the denoiser alone.",
        metavar="KIND", aliases=("quantize_unet", "quantize_transformer"))
    quantize_encoder_to: str | None = _quantize(
        None, str, "The same for text and image encoders alone.",
        metavar="KIND", aliases=("quantize_encoder",))
    quantize_misc_to: str | None = _quantize(
        None, str, "The same for ControlNet and motion adapter.",
        metavar="KIND", aliases=("quantize_misc",))
    quantize_vae: str | None = _quantize(
        None, str, "The same for the VAE.", metavar="KIND", aliases=("quantize_vae_to",))

    compile_unet: bool = _compile(
        False, _switch, "Compile the denoiser.", aliases=("compile_transformer",))
    compile_vae: bool = _compile(
        False, _switch, "Compile the VAE decoder. Each rank then decodes the whole image.")
    compile_text_encoder: bool = _compile(
        False, _switch, "Compile the text encoders.", aliases=("compile_encoder",))
    compile_backend: str | None = _compile(
        None, compile_backend, "Backend of torch.compile. Default: inductor.")
    compile_mode: str | None = _compile(
        None, one_of(*COMPILE_MODES), f"Mode of torch.compile: {', '.join(COMPILE_MODES)}. "
        "Default: torch's.")
    compile_options: dict[str, Any] | None = _compile(
        None, json_object, "Options of torch.compile, as JSON. They replace --compile_mode.",
        metavar="JSON")
    compile_fullgraph_off: bool = _compile(False, _switch, "Allow graph breaks.")
    torch_cache_limit: int | None = _compile(
        None, whole(0), "Compiled graphs to keep per function. Default: 64.")
    torch_accumulated_cache_limit: int | None = _compile(
        None, whole(0), "Compiled graphs to keep in all. Default: torch's.",
        aliases=("torch_accumlated_cache_limit",))
    torch_capture_scalar: bool = _compile(False, _switch, "Capture scalar outputs in graphs.")

    shard: str = _memory(
        "auto", one_of("auto", "always", "never"), "Divide the weights of denoiser and text "
        "encoders among the ranks, and gather a block's weights when it runs. `auto`: if they do "
        "not fit on one GPU.")
    encoder_placement: str = _memory(
        "auto", one_of("auto", "every", "one", "spread", "cpu"), "Where the text encoders are: on "
        "`every` rank; all on `one`; `spread`: one on each rank in turn; `cpu`: in main memory, "
        "where they also run. `auto`: on every rank, or `cpu` if the GPUs are too small for that.")
    enable_vae_tiling: bool = _memory(False, _switch, "Decode large images in tiles.")
    enable_vae_slicing: bool = _memory(False, _switch, "Decode the images of a batch one by one.")
    parallel_vae: bool | None = _memory(
        None, _switch, "Decode and encode each image on all ranks together. Default: on.",
        aliases=("use_parallel_vae",))
    enable_attention_slicing: bool = _memory(
        False, _switch, "Compute attention in slices (backends single and asyncdiff).")
    xformers_efficient: bool = _memory(
        False, _switch, "Use xformers attention if it is installed (backends single and "
        "asyncdiff).")
    enable_model_cpu_offload: bool = _memory(False, _switch, "Keep idle components in main memory.")
    enable_sequential_cpu_offload: bool = _memory(
        False, _switch, "Keep idle layers in main memory: least GPU memory, slowest.")
    enable_group_offload: bool = _memory(
        False, _switch, "Keep idle layers in main memory and prefetch them.")

    nnodes: int = _machines(1, whole(1, 64), "Number of machines.")
    node_rank: int = _machines(0, whole(0, 63), "Index of this machine, from 0.")
    rdzv_endpoint: str | None = _machines(
        None, endpoint, "Address of machine 0 as all machines reach it, and a free port there.",
        metavar="HOST:PORT")
    rdzv_key: str | None = _machines(
        None, secret, "Secret that all machines share, or @FILE that holds it. Messages between "
        "ranks are signed with it.", metavar="KEY|@FILE")
    node_timeout: int = _machines(
        600, whole(5, 1_000_000), "Seconds to wait for missing machines, at start and after a "
        "failure.")

    engine: str = _cluster(
        "local", one_of("local", "ray"), "`local`: one host. `ray`: replicas of the host on the "
        "nodes of a Ray cluster, behind one gateway.")
    replicas: int | None = _cluster(
        None, whole(1, 1000), "Replicas at start. Default: --min_replicas, or 1.")
    min_replicas: int | None = _cluster(
        None, whole(1, 1000), "Fewest replicas. Default: --replicas.")
    max_replicas: int | None = _cluster(None, whole(1, 1000), "Most replicas. Default: --replicas.")
    jobs_per_replica: int = _cluster(
        4, whole(1, 1000), "Waiting and running jobs per replica above which one more is started.")
    idle_seconds: int = _cluster(
        300, whole(0, 1_000_000), "Seconds for which fewer replicas must have been enough before "
        "one is stopped.")
    ray_address: str | None = _cluster(
        None, str, "Ray cluster to join. Default: start one on this machine.", metavar="HOST:PORT")
    deployments: dict[str, Any] | None = _cluster(
        None, json_object, "Several models, best given in --config: name -> arguments. Requests "
        "name one as `model`.", metavar="JSON")


    # Spellings with a meaning of their own; others are aliases

    warm_up_steps: int | None = _old(
        None, whole(0, 1000), "--prewarm_steps, and with distrifuser also --warmup_steps.")
    # fmt: on

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings from texts (command line) or YAML values, by canonical name. ConfigError names
        the argument and what is allowed.
        """
        return cls(**{name: _convert(options()[name], value) for name, value in values.items()})

    def in_environment(self, environ: Mapping[str, str]) -> "Settings":
        """Return the settings with what HF_HUB_OFFLINE asks for."""
        is_offline = environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        return replace(self, offline=self.offline or is_offline)

    @property
    def given(self) -> dict[str, Any]:
        """What differs from the defaults, without secrets."""
        return {
            name: getattr(self, name)
            for name, option in options().items()
            if getattr(self, name) != option.default and name not in SECRETS
        }


@cache
def options() -> Mapping[str, Option]:
    """Canonical name -> declaration, in the order of --help."""
    order = list(SECTIONS)
    found = {f.name: replace(f.metadata["option"], name=f.name) for f in fields(Settings)}
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].section)))


@cache
def canonical_names() -> Mapping[str, str]:
    """Every accepted spelling with '_' -> canonical name."""
    return {
        spelling: name
        for name, option in options().items()
        for spelling in (name, *option.aliases)
    }


def _convert(option: Option, value: Any) -> Any:
    if value is None:
        return option.default
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--{option.name} is not allowed ({error}). Allowed in a file: texts, numbers, lists "
            "and names with values, not too deep in each other."
        ) from error
    try:
        return option.parse(text)
    except ValueError as error:
        raise ConfigError(f"--{option.name}={value} is not allowed. Allowed: {error}.") from error
