"""The names of all samplers and schedules: a node's list is made before it is known which host
generates.

The host refuses one that its model cannot use. A test compares them with the host's own.
"""

from typing import Any

SAMPLERS = (
    "ddim", "ddpm", "deis", "dpm_2", "dpm_2_a", "dpm_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde",
    "euler", "euler_a", "heun", "ipndm", "lcm", "lms", "pndm", "tcd", "unipc", "fm_euler",
    "fm_heun", "fm_lcm",
)  # fmt: skip
ALIASES = {"euler_ancestral": "euler_a", "dpm_2_ancestral": "dpm_2_a", "uni_pc": "unipc"}
"""KSampler's names -> the host's, where they differ."""
SCHEDULES: dict[str, dict[str, Any]] = {
    "normal": {},
    "simple": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}
"""KSampler's schedulers -> the settings of a host's sampler. The first two are the model's own."""
