"""Serve one diffusion model on several GPUs: python launcher.py --type=sdxl --port=6000

Checks the arguments, starts torchelastic as its one child, which starts one process per rank, and
waits. Started under torchrun itself it is simply that rank. Imports no torch.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from backends.errors import ConfigError, HostError
from backends.model_table import read_table
from hosts.launch import support_matrix
from hosts.launch.command_line import parse_command_line
from hosts.launch.settings import Settings
from hosts.supervision.parent_watch import request_parent_death_signal
from hosts.supervision.temp_folder import scratch_folder

EXIT_USER_ERROR = 2
COMMANDS = {"generate": "diffusion_client.command", "status": "diffusion_client.status"}
STOP_WITHIN_S = 10.0


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit code 2 and one line for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    sys.path.append(
        str(Path(__file__).resolve().parent / "clients" / "python")
    )  # the Python client, where it lies in a clone
    if argv[:1] and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    if argv[:1] == ["agent"]:
        from hosts.supervision.agent import main as supervise

        return supervise(argv[1:], program=[str(Path(__file__).resolve())])
    try:
        settings = parse_command_line(argv)
        if settings.list:
            table = read_table()
            print(
                support_matrix.as_json(table)
                if settings.json
                else support_matrix.as_markdown(table, features=settings.features)
            )
            return 0
        return _run(settings, argv)
    except HostError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(settings: Settings, argv: list[str]) -> int:
    from hosts.cluster.config import refuse_without_engine
    from hosts.http.server import is_port_free
    from hosts.launch.auto_backend import recall_from
    from hosts.launch.start_plan import count_gpus, plan_start
    from hosts.main import end_rank, is_rank, run_rank

    if is_rank():
        end_rank(run_rank(settings, after_failed_load="exit"))
    if settings.engine == "ray":
        from hosts.cluster.main import run_gateway

        end_rank(run_gateway(settings, os.environ))
    refuse_without_engine(settings)
    start = plan_start(
        settings,
        read_table(),
        num_gpus=count_gpus(os.environ),
        recall=recall_from(settings.state_dir),
    )
    if settings.check:
        print(json.dumps(start.facts(), indent=2) if settings.json else start.describe())
        return 0
    if settings.node_rank == 0 and not is_port_free(settings.host, settings.port):
        raise ConfigError(
            f"--port={settings.port} is in use on {settings.host}. Stop what listens there, or "
            "choose another port."
        )
    return _start_ranks(settings, argv, num_ranks=start.num_ranks)


def _start_ranks(settings: Settings, argv: list[str], *, num_ranks: int) -> int:
    """Run torchelastic until it ends or we are told to stop. Its exit code, or 1 with the reason if
    the host could not serve.
    """
    parent = os.getppid()
    with scratch_folder() as folder:
        fatal_file = folder / "fatal"
        # its own session, so that Ctrl-C reaches it once and through us; it dies with us, whatever
        # kills us
        agent = subprocess.Popen(
            _agent_command(settings, argv, folder, fatal_file, num_ranks=num_ranks),
            env=_environment(folder, fatal_file, num_ranks=num_ranks),
            start_new_session=True,
            preexec_fn=request_parent_death_signal,
        )
        code = _wait(
            agent,
            parent=parent if settings.exit_with_parent else None,
            within_s=settings.drain_seconds + STOP_WITHIN_S,
        )
        if fatal_file.is_file():
            print(f"error: {fatal_file.read_text(encoding='utf-8')}", file=sys.stderr)
            return 1
    return code


def _wait(agent: subprocess.Popen[bytes], *, parent: int | None, within_s: float) -> int:
    """The agent's exit code; 0 if a signal to us ended it, or the end of `parent`. Ranks that are
    told to stop get `within_s`.

    A second signal ends them at once.
    """
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
    while not stopped and parent in (None, os.getppid()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return agent.wait(timeout=0.1)
    ranks = psutil.Process(agent.pid).children()
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + within_s
    while (
        psutil.wait_procs(ranks, timeout=0.05)[1]
        and time.monotonic() < deadline
        and len(stopped) < 2
    ):
        pass
    # it has nothing left to do; what is left of its ranks follows it. Its own way out is slow and
    # ends in a traceback
    agent.kill()
    agent.wait()
    return 0


def _agent_command(
    settings: Settings, argv: list[str], folder: Path, fatal_file: Path, *, num_ranks: int
) -> list[str]:
    options = {
        "num_ranks": num_ranks,
        "max_restarts": settings.max_restarts,
        "notes": str(folder / "notes"),
        "fatal": str(fatal_file),
        "first_rank": settings.node_rank * num_ranks,
    }
    return [sys.executable, str(Path(__file__).resolve()), "agent", json.dumps(options), *argv]


def _environment(folder: Path, fatal_file: Path, *, num_ranks: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    defaults = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    own = {"DIFFUSION_FATAL_FILE": str(fatal_file), "DIFFUSION_STATE_FOLDER": str(folder / "state")}
    own["DIFFUSION_NOTES_FOLDER"] = str(folder / "notes")
    return {**defaults, **os.environ, **own}


if __name__ == "__main__":
    sys.exit(main())
