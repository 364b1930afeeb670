"""What must be settled before torch, diffusers and peft are imported. Imports none of them
itself.
"""

from collections.abc import MutableMapping
from contextlib import suppress

from hosts.launch.gpus import RANK_ENVIRONMENT

DEFAULTS = {
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that the libraries read on import: no chatter in the log, and no downloads.
HF_HUB_OFFLINE is the user's: the process that downloads is another one (backends/hub/worker.py).
"""
OTHER_NAMES = {
    "PYTORCH_CUDA_ALLOC_CONF": ("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    "TORCH_NCCL_TRACE_BUFFER_SIZE": ("TORCH_FR_BUFFER_SIZE",),
}
"""Names under which the user may have set the same: ours would overrule or contradict them."""
DISABLES_DYNAMO = "TORCHDYNAMO_DISABLE"
"""Torch's environment variable, which it reads at each call of torch.compile."""


def set_library_defaults(environ: MutableMapping[str, str]) -> None:
    """Set the defaults that the user has not set."""
    for name, value in {**DEFAULTS, **RANK_ENVIRONMENT}.items():
        if not any(other in environ for other in OTHER_NAMES.get(name, ())):
            environ.setdefault(name, value)


def import_bitsandbytes(environ: MutableMapping[str, str]) -> None:
    """Import bitsandbytes before peft does. It compiles a few functions on import, and so loads all
    of inductor: 2 s and 50 MB per rank.
    """
    given = environ.get(DISABLES_DYNAMO)
    environ[DISABLES_DYNAMO] = "1"
    # a broken CUDA installation shows in it as an error of any kind
    with suppress(Exception):
        import bitsandbytes  # noqa: F401
    if given is None:
        del environ[DISABLES_DYNAMO]
    else:
        environ[DISABLES_DYNAMO] = given
