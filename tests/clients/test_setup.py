"""setup.sh: asks nothing, finds its repository from wherever it is linked, and says what to do where there is none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "clients" / "multigpu_diffusion" / "setup.sh"

# Stands in for the interpreter that makes the environment: notes the call, and installs itself as the environment's python.
# Without a terminal or a pipe to read from, a question would end the script.
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
    for file in ("setup.py", "constraints.txt"):
        (tmp_path / "repository" / file).touch()
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "multigpu_diffusion").symlink_to(folder)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(script: Path, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": str(folder / "python"), "CALLS": str(folder / "calls")}
    return subprocess.run([script], cwd=folder, env=environment, input="yes\n", capture_output=True, text=True, timeout=30)


def test_linked_folder_installs_its_repository_without_a_question(repository):
    done = run(repository / "client" / "multigpu_diffusion" / "setup.sh", repository)
    root = (repository / "repository").resolve()
    assert done.returncode == 0, done.stderr
    assert (repository / "calls").read_text().splitlines() == [
        f"{root}: -m venv .venv",
        f"{root}: -m pip install --constraint constraints.txt --editable .",
    ]
    assert f"{root}/.venv/bin first on PATH" in done.stdout


def test_failure_of_the_environment_ends_the_script(repository):
    (repository / "python").write_text("#!/bin/sh\nexit 7\n")
    assert run(repository / "client" / "multigpu_diffusion" / "setup.sh", repository).returncode == 7


def test_copied_folder_says_to_link_it(repository):
    (repository / "elsewhere" / "deeper").mkdir(parents=True)
    copied = shutil.copytree(SCRIPT.parent, repository / "elsewhere" / "deeper" / "multigpu_diffusion")
    done = run(copied / "setup.sh", repository)
    assert done.returncode == 2
    assert "was copied out of its repository" in done.stderr
    assert "ln -s" in done.stderr
    assert not (repository / "calls").exists()
