"""The command itself, as a process: what it prints, the code it ends with, and that it loads
nothing before it has to.
"""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import launcher
from hosts.jobs.store import JobStore
from hosts.launch.command_line import parse_command_line
from tests.altered import without_a_weight
from tests.checkpoints import checkpoint
from tests.hosts.harness import (
    LAUNCHER,
    REPOSITORY,
    free_port,
    run_launcher,
    start_launcher,
    wait_until,
)


def test_help_names_every_section_and_imports_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(LAUNCHER), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert (
        "--sync_mode" in done.stdout
        and "Example: python launcher.py --type=sdxl --port=6000" in done.stdout
    )
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if "import time" in line
    }
    assert "argparse" in imported and not imported & {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "flask",
    }


def test_installed_command_is_the_launcher():
    command = Path(sys.executable).with_name("diffusion-launcher")
    done = subprocess.run([command, "--list", "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and {"sdxl", "flux"} <= set(json.loads(done.stdout))


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, str(LAUNCHER), "--list", "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tpye=sdxl"], "--tpye=sdxl is not an argument of this command. Did you mean --type?"),
        (["--type=sdx"], "type='sdx' is not a model type. Did you mean 'sdxl'? Allowed: "),
        ([], "--type is missing. Give it, or a --checkpoint that says what it is. Allowed: "),
        (["--type=flux"], "--checkpoint is missing: type 'flux' has no demo model."),
        (
            ["--type=sdxl", "--checkpoint=/nowhere/model"],
            "--checkpoint=/nowhere/model does not exist.",
        ),
        (["--type=sdxl", "--scheduler={oops"], "--scheduler={oops is not allowed."),
        (["--type=sdxl", "--lora={oops"], "--lora={oops is not allowed."),
        (["--type=sdxl", "--port=0"], "--port=0 is not allowed."),
        (
            ["--type=sdxl", "--backend=xdit", "--nproc_per_node=4", "--use_cfg_parallel"],
            "xdit: --use_cfg_parallel 2 = 2 ranks, but 4",
        ),
        (
            ["--type=sdxl", "--backend=asyncdiff", "--nproc_per_node=2", "--model_n=4"],
            "model_n=4 and stride=1 need 4 ranks",
        ),
        (["--type=sdxl", "--config=/nowhere.yaml"], "--config=/nowhere.yaml cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_users_mistake_is_one_line_and_exit_code_2(arguments, said, capsys):
    code = launcher.main(arguments)
    told = capsys.readouterr()
    assert (code, told.out) == (2, "")
    assert told.err.startswith("error: ") and told.err.count("\n") == 1
    assert said in told.err


def test_users_mistake_is_the_exit_code_of_the_process():
    done = run_launcher("--type=sdx")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: type='sdx' is not a model type.")
        and done.stderr.count("\n") == 1
    )


def test_check_prints_the_plan_and_starts_nothing():
    done = run_launcher(
        "--type=sdxl", "--nproc_per_node=2", "--backend=distrifuser", "--check", "--json"
    )
    facts = json.loads(done.stdout)
    assert done.returncode == 0
    assert (facts["type"], facts["backend"], facts["ranks"], facts["axes"]["cfg"]) == (
        "sdxl",
        "distrifuser",
        2,
        2,
    )
    text = run_launcher(
        "--type=sdxl", "--nproc_per_node=2", "--backend=distrifuser", "--check"
    ).stdout
    assert "backend      distrifuser" in text and "because" in text


@pytest.mark.slow
def test_checkpoint_that_does_not_load_ends_the_host_with_its_reason_and_is_not_tried_again(
    tmp_path,
):
    folder = without_a_weight(checkpoint("sdxl"), tmp_path / "broken")
    done = run_launcher(
        "--type=sdxl", f"--checkpoint={folder}", f"--port={free_port()}", timeout_s=170
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: --checkpoint={folder} (unet) does not fit: 1 tensor is missing")
    assert done.stderr.count("listening on") == 1


def test_continuous_integration_runs_the_linter_and_then_the_tests():
    steps = (REPOSITORY / ".ci" / "run").read_text().split()
    assert steps.index("lint") < steps.index("test")


@pytest.mark.parametrize(
    "folder", ["/dev/null", "/dev/null/below", "/proc/none", "/" + "x" * 300, "FILE"]
)
def test_state_dir_that_cannot_be_used_is_a_users_mistake_before_any_rank_starts(
    folder, tmp_path, capsys
):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file") if folder == "FILE" else folder
    code = launcher.main(
        ["--type=sdxl", "--nproc_per_node=2", f"--port={free_port()}", f"--state_dir={folder}"]
    )
    told = capsys.readouterr().err
    assert (
        code == 2 and told.startswith(f"error: --state_dir={folder[:20]}") and told.count("\n") == 1
    )


def test_second_host_on_a_state_dir_is_a_users_mistake(tmp_path):
    held = JobStore(tmp_path)
    try:
        done = run_launcher(
            "--type=sdxl", "--nproc_per_node=2", f"--port={free_port()}", f"--state_dir={tmp_path}"
        )
    finally:
        held.close()
    assert (done.returncode, done.stderr.count("\n")) == (
        2,
        1,
    ) and "is in use by another host" in done.stderr


def test_agent_that_is_killed_ends_the_launcher_with_the_reason():
    with start_launcher("--type=sdxl", f"--checkpoint={checkpoint('sdxl')}") as host:
        wait_until(lambda: len(host.tree()) > 1, within_s=60, what="the agent runs")
        (agent,) = psutil.Process(host.process.pid).children()
        agent.kill()
        assert host.process.wait(timeout=20) == 1
        said = "the process that supervises the ranks was killed by SIGKILL. Start again."
        assert host.log.splitlines()[-1] == f"error: {said}"


def test_rank_that_says_why_none_can_go_on_ends_those_that_wait_for_it(capfd):
    """The port is taken only once the launcher has looked at it, as somebody may do between a kill
    and the restart.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = ["--type=sdxl", "--nproc_per_node=2", "--backend=distrifuser", f"--port={port}"]
        try:
            code = launcher._start_ranks(parse_command_line(argv), argv, num_ranks=2)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    said = capfd.readouterr().err
    assert code == 1 and f"error: --port={port} cannot be bound" in said
    assert said.count("cannot be bound") == 2, (
        "the ranks were started again"
    )  # by rank 0, and by the launcher
