"""Which schedulers a name, a dict or JSON may mean, and what is refused before one is built."""

import importlib.util
import inspect
import subprocess
import sys

import pytest

from backends.generation import schedulers
from backends.generation.schedulers import (
    ALIASES,
    SCHEDULERS,
    SchedulerChoice,
    SchedulerError,
    parse_scheduler,
)
from tests.backends.generation.test_schedulers import built

CONTRACT_NAMES = (
    "ddim ddpm deis dpm_2 dpm_2_a dpm_sde dpmpp_2m dpmpp_2m_sde dpmpp_sde euler euler_a heun ipndm "
    "lms pndm tcd unipc fm_euler fm_heun lcm"
).split()


def test_every_name_of_the_clients_is_known():
    assert set(CONTRACT_NAMES) <= set(SCHEDULERS)


@pytest.mark.parametrize(
    ("value", "name", "overrides"),
    [
        (None, None, {}),
        ("", None, {}),
        ("euler", "euler", {}),
        (" k_dpmpp_2m ", "dpmpp_2m", {"use_karras_sigmas": True}),
        (
            '{"scheduler": "dpmpp_2m", "use_karras_sigmas": true}',
            "dpmpp_2m",
            {"use_karras_sigmas": True},
        ),
        ('"DPM++ 2M"', "dpmpp_2m", {}),
        ({"scheduler": ""}, None, {}),
        ({"timestep_spacing": "trailing"}, None, {"timestep_spacing": "trailing"}),
        ({"scheduler": "heun", "steps_offset": None}, "heun", {}),
        (
            {"scheduler": "k_euler", "use_karras_sigmas": False},
            "euler",
            {"use_karras_sigmas": False},
        ),
        ("DPM++ 2M Karras", "dpmpp_2m", {"use_karras_sigmas": True}),
    ],
)
def test_reads_names_dicts_and_json(value, name, overrides):
    assert parse_scheduler(value) == SchedulerChoice(name=name, overrides=overrides)


@pytest.mark.parametrize(
    ("display", "name"),
    [
        ("DDIM", "ddim"),
        ("DDPM", "ddpm"),
        ("DEIS", "deis"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ SDE", "dpmpp_sde"),
        ("DPM SDE", "dpm_sde"),
        ("DPM2", "dpm_2"),
        ("DPM2 a", "dpm_2_a"),
        ("Euler", "euler"),
        ("Euler a", "euler_a"),
        ("FM Euler", "fm_euler"),
        ("FM Heun", "fm_heun"),
        ("Heun", "heun"),
        ("LMS", "lms"),
        ("PNDM", "pndm"),
        ("TCD", "tcd"),
        ("UniPC", "unipc"),
    ],
)
def test_reads_display_names(display, name):
    assert parse_scheduler({"scheduler": display}).name == name


def test_reading_does_not_change_the_dict_it_was_given():
    given = {"scheduler": "euler", "timestep_spacing": "leading"}
    parse_scheduler(given)
    assert given == {"scheduler": "euler", "timestep_spacing": "leading"}


def test_reading_imports_no_torch():
    code = (
        "import sys, backends.generation.schedulers as s; s.parse_scheduler('k_euler'); "
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "eular",
            r"scheduler='eular' is not a scheduler\. Did you mean 'euler'\? Allowed: ddim, .*unipc",
        ),
        ("zzz", r"scheduler='zzz' is not a scheduler\. Allowed: ddim"),
        ('{"scheduler": "euler"', r"is not valid JSON"),
        ("[" * 5000, r"is not valid JSON"),
        ('{"a":' * 3000, r"is not valid JSON"),
        ("x" * 30_000, r"scheduler has 30000 characters. Allowed: 20000"),
        ('{"shift": ' + "1" * 5000 + "}", r"is not valid JSON"),
        ("x" * 5000, r"^scheduler='x{79} is not a scheduler"),
        ({"scheduler": 3}, r"scheduler=3 is not a name"),
        ('["euler"]', r"scheduler=\['euler'\] is not a name"),
        (
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            r"use_karras_sigmas and use_beta_sigmas exclude each other",
        ),
        (
            {"scheduler": "euler", "use_karras_sigmas": "yes"},
            r"use_karras_sigmas='yes' is not allowed\. Allowed: true, false",
        ),
        (
            {"timestep_spacing": "even"},
            r"timestep_spacing='even' is not allowed\. Allowed: leading, linspace, trailing",
        ),
    ],
)
def test_refuses_what_cannot_be_read(value, message):
    with pytest.raises(SchedulerError, match=message) as refusal:
        parse_scheduler(value)
    assert refusal.value.field == "scheduler"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_facts_are_those_of_the_class(name):
    facts = SCHEDULERS[name]
    scheduler_class = schedulers._class(facts.module, facts.class_name)
    parameters = inspect.signature(scheduler_class.set_timesteps).parameters
    assert facts.order == scheduler_class.order
    assert facts.takes_timesteps == ("timesteps" in parameters)
    assert facts.takes_sigmas == ("sigmas" in parameters)
    assert facts.flow == hasattr(scheduler_class, "scale_noise")
    assert (
        not facts.flow_solver
        or "use_flow_sigmas" in inspect.signature(scheduler_class.__init__).parameters
    )
    assert facts.flow_name is None or SCHEDULERS[facts.flow_name].flow


def test_aliases_lead_to_names():
    assert set(ALIASES.values()) <= set(SCHEDULERS)


@pytest.mark.parametrize("name", ["ddim", "euler_a", "deis", "pndm", "lms", "tcd"])
def test_refuses_an_epsilon_sampler_for_a_flow_matching_model(name):
    with pytest.raises(
        SchedulerError,
        match=(
            f"'{name}' cannot sample a flow-matching model. Allowed for this model: dpmpp_2m, "
            ".*fm_euler"
        ),
    ):
        built(name, "sd3")


def test_refuses_a_flow_sampler_for_an_epsilon_model():
    with pytest.raises(
        SchedulerError,
        match=r"'fm_euler' is for flow-matching models only.*Allowed for this model: ddim",
    ):
        built("fm_euler", "sd1")


@pytest.mark.parametrize(
    ("value", "package"),
    [
        ("dpm_sde", "torchsde"),
        ("lms", "scipy"),
        ({"scheduler": "euler", "use_beta_sigmas": True}, "scipy"),
    ],
)
def test_refuses_what_needs_a_package_that_is_not_there(monkeypatch, value, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SchedulerError, match=f"needs the package {package}, which is not installed"
    ):
        built(value, "sd1")


def test_refuses_settings_that_the_class_refuses():
    with pytest.raises(
        SchedulerError,
        match=r'EulerDiscreteScheduler refuses its settings {"beta_schedule": "odd"}',
    ):
        built({"scheduler": "euler", "beta_schedule": "odd"}, "sd1")
