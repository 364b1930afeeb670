"""Serve one diffusion model on several GPUs: python launcher.py --type=sdxl --port=6000

Checks the arguments, then starts one process per rank through torchelastic's agent and waits. Run
by torchrun, it is one rank itself. Imports no torch.
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path

from backends.errors import ConfigError, HostError
from backends.model_table import read_table
from hosts.launch import support_matrix
from hosts.launch.command_line import parse_command_line
from hosts.launch.settings import Settings

EXIT_USER_ERROR = 2
LONG_WORD = re.compile(r"(\S{300})\S{200,}")
"""What is shortened in an error: a value that was given, but no path that is likely."""
COMMANDS = {
    "generate": "diffusion_client.command",
    "measure": "diffusion_client.measure",
    "status": "diffusion_client.status",
}
LISTING = ("list", "features", "all", "json")
"""Arguments of the table of types."""
SCRIPT = Path(__file__).resolve()


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Exit code 2 and one line for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    sys.path.append(str(SCRIPT.parent / "clients" / "python"))  # the Python client in a clone
    if argv[:1] and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    if argv[:1] == ["agent"]:
        from hosts.supervision.agent import main as supervise

        if len(argv) < 2 or not argv[1].startswith('{"num_ranks":'):
            print("error: `agent` is for the launcher itself. See --help.", file=sys.stderr)
            return EXIT_USER_ERROR
        return supervise(argv[1:], program=[str(SCRIPT)], environ=os.environ)
    try:
        settings = parse_command_line(argv)
        _require_listing(settings)
        settings = settings.in_environment(os.environ)
        if settings.list:
            return _show(_matrix(settings))
        return _run(settings, argv)
    except HostError as error:
        text = LONG_WORD.sub(r"\1...", " ".join(str(error).split()))
        print(f"error: {text}", file=sys.stderr)
        return EXIT_USER_ERROR


def _require_listing(settings: Settings) -> None:
    """ConfigError for an argument that --list does not read, or that only --list reads."""
    for name in LISTING[1:]:
        is_read = settings.list or (name == "json" and settings.check)
        if name in settings.given and not is_read:
            either = "--list or --check" if name == "json" else "--list"
            raise ConfigError(
                f"--{name} was given without {either}. Give that too, or leave it out."
            )
    for name in settings.given if settings.list else ():
        if name not in LISTING:
            raise ConfigError(
                f"--{name} was given beside --list, which shows all types and reads only "
                f"{', '.join(f'--{each}' for each in LISTING[1:])}. Leave one of them out."
            )


def _show(text: str) -> int:
    """Print a table that a user may read with `head`, which ends before we do."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return 0


def _matrix(settings: Settings) -> str:
    table = read_table()
    if settings.json:
        return support_matrix.as_json(table, with_classes=settings.all)
    text = support_matrix.as_markdown(table, features=settings.features)
    return f"{text}\n\n{support_matrix.classes_as_markdown(table)}" if settings.all else text


def _run(settings: Settings, argv: list[str]) -> int:
    """Become a rank or the gateway, or check the plan and start the ranks of this machine."""
    from hosts.cluster.config import refuse_without_engine
    from hosts.http.server import is_port_free, require_address
    from hosts.launch.auto_backend import recall_from
    from hosts.launch.catalog import describe, facts_of, plan_models
    from hosts.launch.gpus import gpu_facts
    from hosts.launch.start_plan import plan_start
    from hosts.main import is_rank, require_store, run_rank, wait_for_turn
    from hosts.supervision.parent_watch import end_process

    wait_for_turn()
    if is_rank():
        from hosts.compat.protocol import FixedModel

        end_process(run_rank(settings, protocol=FixedModel, after_failed_load="exit"))
    if settings.engine == "ray":
        from hosts.cluster.main import run_gateway

        end_process(run_gateway(settings, os.environ))
    refuse_without_engine(settings)
    facts = {"recall": recall_from(settings.state_dir), **gpu_facts(os.environ)}
    models = plan_models(settings, lambda own: plan_start(own, read_table(), **facts))
    if settings.node_rank == 0:
        require_address(settings.host)
    if settings.check:
        return _show(json.dumps(facts_of(models), indent=2) if settings.json else describe(models))
    if settings.node_rank == 0 and not is_port_free(settings.host, settings.port):
        raise ConfigError(
            f"--port={settings.port} is in use on {settings.host}. Stop the program that listens "
            "there, or choose another port."
        )
    if settings.node_rank == 0:
        require_store(settings)
    num_ranks = next(iter(models.values())).start.num_ranks
    return _start_ranks(settings, argv, num_ranks=num_ranks)


def _start_ranks(settings: Settings, argv: list[str], *, num_ranks: int) -> int:
    from hosts.supervision.agent_process import run_agent

    code, problem = run_agent(
        settings, argv, num_ranks=num_ranks, script=SCRIPT, environment=os.environ
    )
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
