"""The names of all samplers: a node's list is made before it is known which host generates.

The host refuses one that its model cannot use. A test compares them with the host's own.
"""

SAMPLERS = (
    "ddim", "ddpm", "deis", "dpm_2", "dpm_2_a", "dpm_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde",
    "euler", "euler_a", "heun", "ipndm", "lcm", "lms", "pndm", "tcd", "unipc", "fm_euler",
    "fm_heun", "fm_lcm",
)  # fmt: skip
