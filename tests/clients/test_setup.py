"""setup.sh: asks nothing, finds its repository from wherever it is linked, and says what to do
where there is none.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "clients" / "multigpu_diffusion" / "setup.sh"

# Stands in for the interpreter that makes the environment: notes the call and whatever it can read
# as an answer to a question, and puts itself into the environment.
PYTHON = """#!/bin/sh
echo "$PWD: $*" >> "$CALLS"
if read -r answer; then echo "read: $answer" >> "$CALLS"; fi
if [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi
"""


@pytest.fixture
def repository(tmp_path):
    """A checkout in miniature; its folder for the clients is linked from a client's folder."""
    folder = tmp_path / "repository" / "clients" / "multigpu_diffusion"
    folder.mkdir(parents=True)
    shutil.copy2(SCRIPT, folder)
    for file in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy2(ROOT / file, tmp_path / "repository")
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "multigpu_diffusion").symlink_to(folder)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(script: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHON": str(folder / "python"),
        "CALLS": str(folder / "calls"),
        **variables,
    }
    return subprocess.run(
        [script],
        cwd=folder,
        env=environment,
        input="yes\n",
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_linked_folder_installs_its_repository_without_a_question(repository):
    done = run(repository / "client" / "multigpu_diffusion" / "setup.sh", repository)
    root = (repository / "repository").resolve()
    assert done.returncode == 0, done.stderr
    calls = (repository / "calls").read_text().splitlines()
    assert calls[0] == f"{root}: -m venv .venv"
    assert calls[1].startswith(f"{root}: -m pip install ")
    assert "-e ." in calls[1]
    assert len(calls) == 2
    assert f"{root}/.venv/bin first on PATH" in done.stdout


def test_second_run_does_nothing(repository):
    script = repository / "client" / "multigpu_diffusion" / "setup.sh"
    assert run(script, repository).returncode == 0
    calls = (repository / "calls").read_text()
    assert run(script, repository).returncode == 0
    assert (repository / "calls").read_text() == calls


def test_failure_of_the_installation_ends_the_script(repository):
    (repository / "python").write_text("#!/bin/sh\nexit 7\n")
    done = run(repository / "client" / "multigpu_diffusion" / "setup.sh", repository)
    assert done.returncode != 0
    assert "Installed" not in done.stdout


def test_missing_make_is_named(repository):
    """A PATH with the few tools the script uses before make."""
    tools = repository / "tools"
    tools.mkdir()
    for tool in ("sh", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = run(
        repository / "client" / "multigpu_diffusion" / "setup.sh", repository, PATH=str(tools)
    )
    assert done.returncode == 2
    assert "make is not installed" in done.stderr


def test_copied_folder_says_to_link_it(repository):
    (repository / "elsewhere" / "deeper").mkdir(parents=True)
    copied = shutil.copytree(
        SCRIPT.parent, repository / "elsewhere" / "deeper" / "multigpu_diffusion"
    )
    done = run(copied / "setup.sh", repository)
    assert done.returncode == 2
    assert "was copied out of its repository" in done.stderr
    assert "ln -s" in done.stderr
    assert not (repository / "calls").exists()
