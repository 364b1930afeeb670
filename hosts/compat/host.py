"""Entry point of clients/multigpu_diffusion/host_<backend>.py.

It runs one rank of a host that the existing clients start with torchrun.
"""

import os
import sys
from dataclasses import replace

from hosts.compat.args import settings_or_problem
from hosts.compat.protocol import FixedModel, ModelOverHttp
from hosts.main import is_rank, run_rank
from hosts.supervision.parent_watch import end_process

BIND_PATIENCE_S = 30.0
"""A client may start the next host before the port of the last one, which it killed, is free."""


def serve(backend: str) -> None:
    """Serve with `backend` until killed. Does not return.

    Without --checkpoint and --type it waits for a pipeline (hosts/ranks/model_loop.py).
    """
    if not is_rank():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    settings, problem = settings_or_problem(sys.argv[1:], backend=backend)
    names = (settings.checkpoint, settings.type, settings.models)
    starts_empty = not any(names)
    if starts_empty and not any(argument.startswith("--mode") for argument in sys.argv[1:]):
        settings = replace(settings, mode="latency")  # its clients send one job at a time
    end_process(
        run_rank(
            settings,
            protocol=ModelOverHttp if starts_empty else FixedModel,
            after_failed_load="answer",
            bind_patience_s=BIND_PATIENCE_S,
            problem=problem,
            starts_empty=starts_empty,
        )
    )
