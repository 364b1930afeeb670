"""What is deployed: arguments and files -> models and replicas, and what is refused before anything
starts.
"""

import json
import subprocess
import sys

import pytest
import yaml

from backends.errors import ConfigError
from backends.model_table import read_table
from hosts.cluster.config import plan_deployments, refuse_without_engine
from hosts.launch.command_line import parse_command_line
from hosts.launch.settings import Settings
from tests.hosts.harness import LAUNCHER, run_launcher


def plans(*arguments, num_gpus=0):
    return plan_deployments(
        parse_command_line(["--engine=ray", *arguments]), read_table(), num_gpus=num_gpus
    )


def from_file(tmp_path, **content):
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"engine": "ray", **content}))
    return plan_deployments(parse_command_line([f"--config={file}"]), read_table(), num_gpus=0)


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ([], (1, 1, 1)),
        (["--replicas=3"], (3, 3, 3)),
        (["--replicas=2", "--max_replicas=4"], (2, 2, 4)),
        (["--min_replicas=1", "--max_replicas=4"], (1, 1, 4)),
        (["--replicas=2", "--min_replicas=1"], (2, 1, 2)),
    ],
    ids=str,
)
def test_counts_that_are_not_given_follow_from_those_that_are(arguments, counts):
    (plan,) = plans("--type=sdxl", *arguments)
    assert (plan.first, plan.minimum, plan.maximum) == counts
    assert (plan.name, plan.ranks) == ("sdxl", 1)


def test_each_model_of_a_file_has_the_common_arguments_and_its_own(tmp_path):
    painter, sketcher = from_file(
        tmp_path,
        port=7000,
        max_steps=50,
        type="sdxl",
        deployments={
            "painter": {"replicas": 2, "nproc-per-node": 2},
            "sketcher": {"max_steps": 10, "max_replicas": 3},
        },
    )
    assert (painter.name, painter.first, painter.ranks, painter.settings.max_steps) == (
        "painter",
        2,
        2,
        50,
    )
    assert (
        sketcher.name,
        sketcher.first,
        sketcher.maximum,
        sketcher.ranks,
        sketcher.settings.max_steps,
    ) == ("sketcher", 1, 3, 1, 10)
    assert painter.settings.port == sketcher.settings.port == 7000


def test_a_replica_is_launched_with_the_models_arguments_and_none_of_the_gateways():
    (plan,) = plans(
        "--type=sdxl", "--replicas=2", "--port=7000", "--api_key=0123456789abcdef",
        "--rate_limit=5", "--image_scale=50", "--mode=latency",
        "--state_dir=/nowhere", "--max_job_seconds=9", "--drain_seconds=30",
    )  # fmt: skip
    assert plan.launch_values() == {
        "type": "sdxl",
        "mode": "latency",
        "drain_seconds": 30,
        "nproc_per_node": 1,
        "no_job_store": True,
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--replicas=2"],
            r"--type is missing\. Allowed: sd1, .*; or describe several models in --config, under "
            r"deployments",
        ),
        (
            ["--type=sdxl", "--replicas=3", "--max_replicas=2"],
            r"3 replicas are not between min_replicas=3 and max_replicas=2\. Give",
        ),
        (
            ["--type=sdxl", "--nnodes=2"],
            r"--nnodes was given, but with --engine=ray a replica's ranks are on one machine\. "
            r"Leave it out",
        ),
        (["--type=flux"], r"deployment 'flux': --checkpoint is missing"),
        (["--deployments={}"], r"deployments is empty\. Give at least one"),
        (['--deployments={"a": 3}'], r"deployment 'a' must hold 'name: value' lines, not a int"),
        (
            ['--deployments={"a": {"typ": "sdxl"}}'],
            r"deployment 'a' has an unknown name 'typ'\. Did you mean --type\?",
        ),
        (
            ['--deployments={"a": {"port": 1}}'],
            r"'a' has port, which is the gateway's for all models\. Give it beside deployments",
        ),
        (
            ['--deployments={"a": {"type": "sdxl", "replicas": 0}}'],
            r"--replicas=0 is not allowed\. Allowed: a whole number from 1 to 1000",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_deployed_is_refused_with_the_reason(arguments, says):
    with pytest.raises(ConfigError, match=says):
        plans(*arguments)


def test_more_ranks_than_gpus_are_refused_unless_another_cluster_has_them():
    with pytest.raises(
        ConfigError,
        match=r"3 replicas need 6 GPUs, one for each rank, and this machine has 4\. Ask for fewer",
    ):
        plans("--type=sdxl", "--replicas=3", "--nproc_per_node=2", num_gpus=4)
    assert plans("--type=sdxl", "--replicas=2", "--nproc_per_node=2", num_gpus=4)
    assert plans(
        "--type=sdxl",
        "--replicas=3",
        "--nproc_per_node=2",
        "--ray_address=10.0.0.1:6379",
        num_gpus=4,
    )


def test_arguments_of_several_hosts_are_refused_for_one():
    with pytest.raises(
        ConfigError,
        match=(
            r"--max_replicas was given, but it is for --engine=ray\. Give that too, or leave it "
            r"out"
        ),
    ):
        refuse_without_engine(Settings(type="sdxl", max_replicas=2))
    refuse_without_engine(Settings(type="sdxl"))


def test_check_prints_each_model_and_starts_nothing():
    done = run_launcher(
        "--engine=ray", "--type=sdxl", "--replicas=2", "--max_replicas=3", "--check", "--json"
    )
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout)
    assert (plan["model"], plan["replicas"], plan["min_replicas"], plan["max_replicas"]) == (
        "sdxl",
        2,
        2,
        3,
    )


def test_without_ray_the_launcher_says_what_to_install(tmp_path):
    """An interpreter in which looking for ray finds nothing."""
    program = (
        "import importlib.util as util, sys; found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'ray' else found(name, *rest)\n"
        f"sys.path.insert(0, {str(LAUNCHER.parent)!r}); import launcher\n"
        "sys.exit(launcher.main(['--engine=ray', '--type=sdxl']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: --engine=ray needs the package ray, which is not installed. Install it: pip "
        "install 'diffusion-launcher[ray]'.\n"
    )
