"""Settings of --engine=ray -> deployments: models, replica counts and launch arguments. No
torch.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.errors import ConfigError, HostError
from backends.files.checkpoint import infer_type
from backends.model_table import ModelTable
from hosts.launch.command_line import by_canonical_name
from hosts.launch.files import locate_names
from hosts.launch.gpus import lowest_capability
from hosts.launch.settings import Settings, options
from hosts.launch.start_plan import StartPlan, plan_start

OF_A_DEPLOYMENT = frozenset(
    {"replicas", "min_replicas", "max_replicas", "jobs_per_replica", "idle_seconds"}
)
OF_THE_GATEWAY = frozenset(
    {
        "engine", "ray_address", "deployments", "config", "port", "host", "api_key", "api_keys",
        "share_jobs", "state_dir", "public_url", "allowed_hosts", "allowed_origins",
        "trusted_proxies", "rate_limit", "max_body_mb", "log_format", "drain_seconds",
        "exit_with_parent", "check", "json", "list", "features",
    }
)  # fmt: skip
"""Arguments that all models share, so a deployment may not set them."""
NOT_FOR_REPLICAS = (
    OF_A_DEPLOYMENT
    | (OF_THE_GATEWAY - {"log_format", "drain_seconds", "max_body_mb"})
    | {
        "image_scale",
        "max_job_seconds",
        "queue_size",
        "keep_results",
        "keep_results_mb",
        "keep_results_hours",
        "disconnect_grace",
    }
)
"""Arguments for work that the gateway itself does before or after a replica runs a job."""
NAME = r"[A-Za-z0-9][\w.:-]{0,63}"
"""Of a deployment. Its job store is in a folder of this name."""
SEVERAL_MACHINES = ("nnodes", "node_rank", "rdzv_endpoint", "master_port")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """One model and its replicas."""

    name: str
    settings: Settings  # as for a host on this machine
    start: StartPlan
    first: int  # replicas at start
    minimum: int  # replicas
    maximum: int  # replicas

    @property
    def ranks(self) -> int:
        """Ranks of each replica."""
        return self.start.num_ranks

    def launch_values(self) -> dict[str, Any]:
        """A replica's launch arguments without host, port and key."""
        given = {
            name: value
            for name, value in self.settings.given.items()
            if name not in NOT_FOR_REPLICAS
        }
        return {**given, "nproc_per_node": self.ranks, "no_job_store": True}

    def facts(self) -> dict[str, Any]:
        counts = {
            "replicas": self.first,
            "min_replicas": self.minimum,
            "max_replicas": self.maximum,
        }
        return {"model": self.name, **counts, **self.start.facts()}

    def describe(self) -> str:
        counts = f"{self.first} at start, {self.minimum} to {self.maximum}"
        return f"{'model':12} {self.name}\n{'replicas':12} {counts}\n{self.start.describe()}"


def plan_deployments(
    settings: Settings, table: ModelTable, *, num_gpus: int
) -> list[DeploymentPlan]:
    """Return the deployments, the default model first.

    num_gpus: GPUs of this machine, where replicas run unless --ray_address names a cluster.
    ConfigError or another HostError for anything the user must change.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--engine=ray needs the package ray, which is not installed. Install it: pip install "
            "'diffusion-launcher[ray]'."
        )
    if given := [name for name in SEVERAL_MACHINES if name in settings.given]:
        raise ConfigError(
            f"--{given[0]} was given, but with --engine=ray a replica's ranks are on one machine. "
            "Leave it out."
        )
    if settings.models is not None:
        raise ConfigError(
            "--models is for one host. With --engine=ray describe several models in --config, "
            "under deployments."
        )
    local_gpus = num_gpus if settings.ray_address is None else 0
    plans = [
        _plan(name, _merged(settings, name, values), table, local_gpus=local_gpus)
        for name, values in _deployments(settings, table).items()
    ]
    wanted = sum(plan.maximum * plan.ranks for plan in plans)
    if local_gpus and wanted > local_gpus:
        raise ConfigError(
            f"{sum(plan.maximum for plan in plans)} replicas need {wanted} GPUs, one for each "
            f"rank, and this machine has {local_gpus}. "
            "Ask for fewer (--max_replicas, --nproc_per_node), or name a Ray cluster with more "
            "(--ray_address)."
        )
    return plans


def _deployments(settings: Settings, table: ModelTable) -> Mapping[str, Any]:
    if settings.deployments is not None:
        if not settings.deployments:
            raise ConfigError(
                "deployments is empty. Give at least one: a name, and under it the arguments of "
                "its model."
            )
        for name in settings.deployments:
            if not re.fullmatch(NAME, name, re.ASCII):
                raise ConfigError(
                    f"deployment {name!r} cannot be a model's name. Allowed: letters, digits and "
                    "._:- only, at most 64, a letter or digit first."
                )
        return settings.deployments
    if settings.type is None and settings.checkpoint is None:
        raise ConfigError(
            f"--type is missing. Allowed: {', '.join(table)}; or describe several models in "
            "--config, under deployments."
        )
    if settings.type is None:
        checkpoint = Path(locate_names(settings)[0].checkpoint).expanduser()
        return {infer_type(checkpoint, table)[0]: {}}
    return {settings.type: {}}


def _merged(settings: Settings, name: str, values: Any) -> Settings:
    """Return the gateway's settings, overridden by the deployment's own."""
    source = f"deployment {name!r}"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} must hold 'name: value' lines, not a {type(values).__name__}.")
    own = by_canonical_name(values, source=source)
    if shared := sorted(set(own) & OF_THE_GATEWAY):
        raise ConfigError(
            f"{source} has {shared[0]}, which is the gateway's for all models. Give it beside "
            "deployments."
        )
    converted = Settings.from_values(own)
    return replace(settings, **{field: getattr(converted, field) for field in own})


def _plan(name: str, settings: Settings, table: ModelTable, *, local_gpus: int) -> DeploymentPlan:
    settings = replace(settings, nproc_per_node=settings.nproc_per_node or 1, deployments=None)
    try:
        start = plan_start(
            settings,
            table,
            num_gpus=local_gpus,
            capability=lowest_capability() if local_gpus else None,
        )
    except HostError as error:
        raise ConfigError(f"deployment {name!r}: {error}") from error
    first = settings.replicas or settings.min_replicas or 1
    minimum = settings.min_replicas or first
    maximum = settings.max_replicas or max(first, minimum)
    if not minimum <= first <= maximum:
        raise ConfigError(
            f"deployment {name!r}: {first} replicas are not between min_replicas={minimum} and "
            f"max_replicas={maximum}. "
            "Give min_replicas <= replicas <= max_replicas."
        )
    return DeploymentPlan(
        name=name, settings=settings, start=start, first=first, minimum=minimum, maximum=maximum
    )


def refuse_without_engine(settings: Settings) -> None:
    """Raise ConfigError for arguments that need --engine=ray."""
    if given := [name for name in settings.given if options()[name].section == "cluster"]:
        raise ConfigError(
            f"--{given[0]} was given, but it is for --engine=ray. Give that too, or leave it out."
        )
