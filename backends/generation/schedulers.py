"""Schedulers by name: parse users' spellings and build a new diffusers scheduler per generation.

parse_scheduler imports neither torch nor diffusers, so the launcher can refuse a bad `--scheduler`
at once. SCHEDULERS is the only list of names. backends/generation/step_driver.py runs a built
scheduler.
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from backends.errors import RequestError
from backends.files.component_classes import methods_of, settings_of, timestep_arguments
from backends.files.pipeline_calls import called_on_sampler, given_to_sampler
from backends.generation.scheduler_settings import (
    DESCRIBED,
    MAX_SHOWN,
    SIGMA_FLAGS,
    SchedulerError,
    model_fields,
    plain_setting,
    rescaled_noise,
    settings_from,
    shown,
    why_not_at_launch,
    why_refused,
    why_wrong,
)
from backends.model_table import ModelSpec

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

logger = logging.getLogger(__name__)

READ_BY_OTHERS = (
    "timestep_type",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)
"""Config fields that pipelines or the step driver read from any scheduler, of whatever class."""


FROM_LAST_TIMESTEP = ("LCMScheduler", "TCDScheduler")
"""Classes that begin at the last timestep and ignore timestep_spacing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerFacts:
    """The diffusers class behind one name, and what it can do."""

    class_name: str
    module: str = "diffusers"  # where the class is defined
    settings_of: str | None = None  # the class of diffusers whose settings it has, if it is ours
    extra: Mapping[str, Any] = field(default_factory=dict)  # config that selects this sampler
    order: int = 1  # denoiser calls per step; the last step has one
    takes_timesteps: bool = False  # the class accepts a list of timesteps
    takes_sigmas: bool = False  # the class accepts a list of sigmas
    needs: str | None = None  # an optional package
    flow: bool = False  # for flow-matching models only
    flow_name: str | None = None  # the name used instead for a flow-matching model
    flow_solver: bool = False  # can solve flow-matching models with use_flow_sigmas
    adds_noise: bool = False  # draws fresh noise in its steps, whatever its settings
    draws_for_all: bool = False  # draws noise for the whole batch, not with a generator per row


SCHEDULERS: Mapping[str, SchedulerFacts] = MappingProxyType(
    {
        "ddim": SchedulerFacts(class_name="DDIMScheduler"),
        "ddpm": SchedulerFacts(adds_noise=True, class_name="DDPMScheduler", takes_timesteps=True),
        # no flow_solver: with use_flow_sigmas it skips its last step, and a tenth of the noise is
        # left after 30 steps
        "deis": SchedulerFacts(class_name="DEISMultistepScheduler"),
        "dpm_2": SchedulerFacts(class_name="KDPM2DiscreteScheduler", order=2),
        "dpm_2_a": SchedulerFacts(
            adds_noise=True, class_name="KDPM2AncestralDiscreteScheduler", order=2
        ),
        "dpm_sde": SchedulerFacts(
            adds_noise=True,
            class_name="DPMSolverSDEScheduler",
            order=2,
            needs="torchsde",
            draws_for_all=True,
        ),
        "dpmpp_2m": SchedulerFacts(
            class_name="DPMSolverMultistepScheduler",
            extra={"algorithm_type": "dpmsolver++", "solver_order": 2},
            takes_timesteps=True,
            flow_solver=True,
        ),
        "dpmpp_2m_sde": SchedulerFacts(
            class_name="DPMSolverMultistepScheduler",
            extra={"algorithm_type": "sde-dpmsolver++"},
            takes_timesteps=True,
            flow_solver=True,
        ),
        "dpmpp_sde": SchedulerFacts(
            class_name="DPMSolverSinglestepScheduler",
            extra={"lower_order_final": True},
            takes_timesteps=True,
            flow_solver=True,
        ),
        "euler": SchedulerFacts(
            class_name="EulerDiscreteScheduler",
            takes_timesteps=True,
            takes_sigmas=True,
            flow_name="fm_euler",
        ),
        "euler_a": SchedulerFacts(adds_noise=True, class_name="EulerAncestralDiscreteScheduler"),
        "heun": SchedulerFacts(
            class_name="HeunDiscreteScheduler", order=2, takes_timesteps=True, flow_name="fm_heun"
        ),
        # diffusers' own IPNDMScheduler passes times from 0 to 1 and reads the output as v, which
        # suits no latent diffusion model
        "ipndm": SchedulerFacts(
            class_name="IPNDMSigmaScheduler",
            module="backends.generation.ipndm",
            settings_of="EulerDiscreteScheduler",
            takes_timesteps=True,
            takes_sigmas=True,
        ),
        "lcm": SchedulerFacts(
            adds_noise=True, class_name="LCMScheduler", takes_timesteps=True, flow_name="fm_lcm"
        ),
        "lms": SchedulerFacts(class_name="LMSDiscreteScheduler", needs="scipy"),
        # without skip_prk_steps the first three steps need twelve denoiser calls, and a run cannot
        # start part-way
        "pndm": SchedulerFacts(class_name="PNDMScheduler", extra={"skip_prk_steps": True}),
        "tcd": SchedulerFacts(adds_noise=True, class_name="TCDScheduler", takes_timesteps=True),
        "unipc": SchedulerFacts(
            class_name="UniPCMultistepScheduler", takes_sigmas=True, flow_solver=True
        ),
        "fm_euler": SchedulerFacts(
            class_name="FlowMatchEulerDiscreteScheduler",
            takes_timesteps=True,
            takes_sigmas=True,
            flow=True,
        ),
        "fm_heun": SchedulerFacts(class_name="FlowMatchHeunDiscreteScheduler", order=2, flow=True),
        "fm_lcm": SchedulerFacts(
            adds_noise=True,
            class_name="FlowMatchLCMScheduler",
            takes_timesteps=True,
            takes_sigmas=True,
            flow=True,
        ),
    }
)
KNOWN = frozenset(facts.class_name for facts in SCHEDULERS.values())
TAKE_INVERTED = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
"""Classes that can count noise levels backwards, as Mochi does."""
ALIASES = {"dpm2": "dpm_2", "dpm2_a": "dpm_2_a"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerChoice:
    """A name of SCHEDULERS, or None for the checkpoint's own class, and config fields to set."""

    name: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Return whether this is the checkpoint's scheduler, unchanged."""
        return self.name is None and not self.overrides


def parse_scheduler(value: str | Mapping[str, Any] | None) -> SchedulerChoice:
    """Parse a scheduler's name, a dict {"scheduler": name, ...overrides}, or its JSON.

    Names may be spelled "euler", "k_euler" or "DPM++ 2M Karras". No name, or an empty one, keeps
    the checkpoint's class. Raises SchedulerError.
    """
    settings = settings_from(value)
    name = settings.pop("scheduler", None) or None
    overrides = {
        key: plain_setting(key, setting) for key, setting in settings.items() if setting is not None
    }
    if name is not None:
        if not isinstance(name, str):
            raise SchedulerError(
                f"scheduler={shown(name)} is not a name. Give one of: {', '.join(SCHEDULERS)}."
            )
        name, is_karras = _canonical(name)
        if is_karras:
            overrides.setdefault("use_karras_sigmas", True)
    if problem := why_wrong(overrides, has_name=name is not None):
        raise SchedulerError(problem)
    return SchedulerChoice(name=name, overrides=overrides)


def parse_requested(value: str | Mapping[str, Any] | None) -> SchedulerChoice:
    """Parse a request's scheduler, which may set only the fields of scheduler_settings.py.

    Raises SchedulerError.
    """
    choice = parse_scheduler(value)
    if problem := why_refused(choice.overrides):
        raise SchedulerError(problem)
    return choice


def parse_at_launch(value: Mapping[str, Any] | None, model: "SampledModel") -> SchedulerChoice:
    """Parse --scheduler, which may also set what belongs to the model.

    Imports no diffusers, so that the launcher can call it. Raises SchedulerError.
    """
    choice = parse_scheduler(value)
    class_name = None
    if choice.name is not None:
        require_sampler(choice, model)
        class_name = _facts_for_model(choice.name, {}, flow=model.flow)[0].class_name
    if not model.flow and "shift_terminal" in choice.overrides:
        raise SchedulerError(
            "scheduler setting shift_terminal is for flow-matching models only. Leave it out."
        )
    if problem := why_not_at_launch(choice.overrides, class_name):
        raise SchedulerError(problem)
    return choice


def choose_scheduler(
    requested: str | Mapping[str, Any] | None, at_launch: str | Mapping[str, Any] | None
) -> SchedulerChoice:
    """Return the request's scheduler, else the launch option's. Raises SchedulerError."""
    return parse_requested(requested) if requested is not None else parse_scheduler(at_launch)


def _canonical(name: str) -> tuple[str, bool]:
    """Return (name in SCHEDULERS, whether the spelling asks for Karras sigmas)."""
    plain = re.sub(r"[\s\-]+", "_", name.strip().lower().replace("++", "pp"))
    stem = plain.removeprefix("k_").removesuffix("_karras")
    stem = ALIASES.get(stem, stem)
    if stem in SCHEDULERS:
        return stem, plain.startswith("k_") or plain.endswith("_karras")
    closest = difflib.get_close_matches(stem[:MAX_SHOWN], SCHEDULERS, n=1)
    advice = f" Did you mean {closest[0]!r}?" if closest else ""
    allowed = f"{', '.join(SCHEDULERS)}, or k_NAME for Karras sigmas"
    raise SchedulerError(f"scheduler={shown(name)} is not a scheduler.{advice} Allowed: {allowed}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledModel:
    """What decides which samplers a model takes."""

    flow: bool
    own: Mapping[str, Any] = field(default_factory=dict)
    """Config of the checkpoint's scheduler, with `_class_name`; empty where it is not known."""
    pipeline: str = ""
    """Class that computes its own timesteps; empty where the StepDriver does."""

    @classmethod
    def by(cls, spec: ModelSpec) -> "SampledModel":
        pipeline = spec.pipeline if spec.runs_as_is else ""
        return cls(flow=spec.flow_matching, own=spec.sampler, pipeline=pipeline)

    @property
    def samplers(self) -> list[str]:
        """Return the names of SCHEDULERS that can sample it."""
        return [name for name in SCHEDULERS if not self.why_not(name)]

    def why_not(self, name: str) -> str:
        """Return why a name of SCHEDULERS cannot sample it; empty if it can."""
        own = self.own.get("_class_name")
        if own is not None and own not in KNOWN | DESCRIBED:
            return (
                f"cannot sample this model: its own {own} defines noise levels or predictions "
                "that no other sampler knows"
            )
        facts = SCHEDULERS[name]
        if facts.flow and not self.flow:
            return "is for flow-matching models only, and this model is not one"
        if self.flow and not (facts.flow or facts.flow_name or facts.flow_solver):
            return "cannot sample a flow-matching model"
        facts, _ = _facts_for_model(name, self.own, flow=self.flow)
        if self.own.get("invert_sigmas") and facts.class_name not in {own, *TAKE_INVERTED}:
            return "cannot sample this model, whose noise levels count backwards (invert_sigmas)"
        likeness = facts.settings_of or facts.class_name
        taken, flow_sigmas = (
            timestep_arguments(likeness),
            "use_flow_sigmas" in settings_of(likeness),
        )
        given = given_to_sampler(self.pipeline, sampler=likeness, flow_sigmas=flow_sigmas)
        if taken and (more := sorted(given - taken)):
            return (
                f"cannot sample this model: {self.pipeline} gives {' and '.join(more)} of its own "
                f"to the sampler, and {facts.class_name} takes none"
            )
        called, known = called_on_sampler(self.pipeline, sampler=likeness), methods_of(likeness)
        if known and (more := sorted(called - known)):
            return f"cannot sample this model: {facts.class_name} has no {' and '.join(more)}()"
        return ""

    def has_setting(self, name: str | None, key: str) -> bool:
        """Return whether a setting has an effect with the sampler of this name.

        None: the checkpoint's own, or any of the family's where it is not known.
        """
        own = self.own.get("_class_name")
        if name is None and not (own and settings_of(own)):
            return any(self.has_setting(each, key) for each in SCHEDULERS)
        if name is not None and self.why_not(name):
            return False
        facts, fixed = _facts_for_model(name, self.own, flow=self.flow)
        if key == "rescale_betas_zero_snr":
            return not self.flow
        return key in settings_of(facts.settings_of or facts.class_name) - set(fixed)

    def takes_list(self, name: str | None, what: str) -> bool:
        """Return whether the sampler of this name takes a list of `what`, sigmas or timesteps.

        None: the checkpoint's own, which counts as able where it is not known.
        """
        if name is None and not self.own.get("_class_name"):
            return True
        facts, fixed = _facts_for_model(name, self.own, flow=self.flow)
        likeness = facts.settings_of or facts.class_name
        if what not in timestep_arguments(likeness):
            return False
        own = self.own if name is None else {}
        solves_flow = bool({**own, **fixed}.get("use_flow_sigmas"))
        return "use_flow_sigmas" not in settings_of(likeness) or solves_flow == (what == "sigmas")

    def idle_settings(self, choice: SchedulerChoice) -> list[str]:
        """Return the settings that have no effect with the chosen sampler."""
        return [key for key in choice.overrides if not self.has_setting(choice.name, key)]


def no_list(what: str, sampler: str) -> RequestError:
    """Return the error for a list of `what` that a sampler does not take."""
    able = ", ".join(name for name, facts in SCHEDULERS.items() if getattr(facts, f"takes_{what}"))
    return RequestError(
        f"{sampler} does not accept a list of {what} for this model. Schedulers that may: {able}.",
        field=what,
    )


def require_sampler(choice: SchedulerChoice, model: SampledModel) -> None:
    """Raise SchedulerError if the model cannot be sampled by what was chosen."""
    if choice.name is not None and (reason := model.why_not(choice.name)):
        allowed = ", ".join(model.samplers)
        advice = (
            f"Allowed for this model: {allowed}"
            if allowed
            else "Leave scheduler out, or give settings without a name"
        )
        raise SchedulerError(f"scheduler={choice.name!r} {reason}. {advice}.")


def require_effect(choice: SchedulerChoice, model: SampledModel) -> None:
    """Raise SchedulerError for a setting that the chosen class, or else the checkpoint's own one,
    does not have.
    """
    for key in model.idle_settings(choice):
        able = [name for name in SCHEDULERS if model.has_setting(name, key)]
        advice = f", or choose one that has it: {', '.join(able)}" if able else ""
        own = model.own.get("_class_name")
        own = f"this model's own {own}" if own else "this model"
        raise SchedulerError(
            f"scheduler setting {key} has no effect with {choice.name or own}"
            f"{' and this model' if choice.name else ''}. Leave it out{advice}."
        )


def build_scheduler(
    choice: SchedulerChoice, pristine: "Mapping[str, Any] | SchedulerMixin", *, flow: bool
) -> "SchedulerMixin":
    """Return a new scheduler for one generation.

    pristine: the checkpoint's scheduler, or its config with `_class_name`; it is not modified.
    flow: ModelSpec.flow_matching; such a model gets the flow-matching counterpart of the name, if
    there is one. Raises SchedulerError.
    """
    config = (
        dict(pristine)
        if isinstance(pristine, Mapping)
        else dict(pristine.config) | {"_class_name": type(pristine).__name__}
    )
    require_sampler(choice, SampledModel(flow=flow, own=config))
    facts, flow_extra = _facts_for_model(choice.name, config, flow=flow)
    _check_packages(choice, facts)
    scheduler_class = _class(facts.module, facts.class_name)
    if facts.class_name == config["_class_name"]:
        fields = {key: setting for key, setting in config.items() if not key.startswith("_")}
    else:
        fields = model_fields(config)
    if any(choice.overrides.get(flag) for flag in SIGMA_FLAGS):
        # the requested flag replaces the checkpoint's
        fields |= dict.fromkeys(SIGMA_FLAGS, False)
    accepted = set(inspect.signature(scheduler_class.__init__).parameters)
    overrides = dict(choice.overrides)
    if not flow and "rescale_betas_zero_snr" not in accepted:
        # these classes take the noise levels that the setting leads to
        rescales = overrides.pop(
            "rescale_betas_zero_snr", fields.get("rescale_betas_zero_snr", False)
        )
        fields |= rescaled_noise(fields | overrides) if rescales else {}
    wanted = _usable(overrides, accepted - set(flow_extra), facts.class_name)
    settings = {
        key: setting
        for key, setting in (fields | dict(facts.extra) | wanted | flow_extra).items()
        if key in accepted
    }
    try:
        scheduler = scheduler_class(**settings)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        given = json.dumps(choice.overrides, default=str)
        raise SchedulerError(
            f"{facts.class_name} refuses its settings {given}: {error} Leave out or correct the "
            "setting."
        ) from error
    _require_signal(scheduler)
    scheduler.register_to_config(
        **{
            key: config[key]
            for key in READ_BY_OTHERS
            if key in config and key not in choice.overrides
        }
    )
    return scheduler


def _require_signal(scheduler: "SchedulerMixin") -> None:
    """Raise SchedulerError if the first step would divide by a signal level of zero."""
    config = scheduler.config
    begins_last = (
        config.get("timestep_spacing") != "leading"
        or type(scheduler).__name__ in FROM_LAST_TIMESTEP
    )
    divides = (
        config.get("rescale_betas_zero_snr")
        and config.get("prediction_type") == "epsilon"
        and begins_last
    )
    if divides and scheduler.alphas_cumprod[-1] == 0:
        raise SchedulerError(
            "scheduler setting rescale_betas_zero_snr=true gives no image with "
            f"{type(scheduler).__name__} and this model. "
            "Leave it out, or choose euler."
        )


def _usable(overrides: Mapping[str, Any], accepted: set[str], class_name: str) -> dict[str, Any]:
    ignored = sorted(set(overrides) - accepted)
    if ignored:
        logger.warning(
            "scheduler settings ignored, not for %s with this model: %s",
            class_name,
            ", ".join(ignored),
        )
    return {key: setting for key, setting in overrides.items() if key in accepted}


def _facts_for_model(
    name: str | None, config: Mapping[str, Any], *, flow: bool
) -> tuple[SchedulerFacts, dict[str, Any]]:
    """Return the facts of a name that can sample this family of models, or of the checkpoint's own
    class for None, and config fields needed there.
    """
    facts = SchedulerFacts(class_name=config["_class_name"]) if name is None else SCHEDULERS[name]
    # the sigma flags override use_flow_sigmas in the classes that have it, with sigmas up to 14
    # instead of 1
    straight = dict.fromkeys((*SIGMA_FLAGS, "use_lu_lambdas"), False) | {"use_flow_sigmas": True}
    if name is None:
        return facts, straight if flow and config.get("use_flow_sigmas") else {}
    if facts.flow == flow:
        return facts, {}
    if facts.flow_name is not None:
        return SCHEDULERS[facts.flow_name], {}
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return facts, {"prediction_type": "flow_prediction", "flow_shift": shift} | straight


def _check_packages(choice: SchedulerChoice, facts: SchedulerFacts) -> None:
    packages = {facts.needs: f"scheduler={choice.name!r}"} if facts.needs else {}
    if choice.overrides.get("use_beta_sigmas"):
        packages["scipy"] = "use_beta_sigmas"
    for package, what in packages.items():
        if importlib.util.find_spec(package) is None:
            raise SchedulerError(
                f"{what} needs the package {package}, which is not installed. Run `pip install "
                f"{package}` or choose another."
            )


def _class(module: str, class_name: str) -> "type[SchedulerMixin]":
    return getattr(importlib.import_module(module), class_name)
