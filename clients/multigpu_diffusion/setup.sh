#!/bin/sh
# Installs the host into .venv at the root of the repository. Asks nothing; run it again after an update.
# The set-up scripts of the ComfyUI and LocalAI clients run it. PYTHON=... chooses the interpreter (3.11 or newer).
set -eu
export PIP_NO_INPUT=1

folder=$(cd "$(dirname "$0")" && pwd -P)
root=$(cd "$folder/../.." && pwd -P)
if [ ! -f "$root/Makefile" ] || [ ! -f "$root/setup.py" ]; then
    echo "setup.sh: $folder was copied out of its repository, so there is nothing to install. Link it instead:" >&2
    echo "    ln -s <repository>/clients/multigpu_diffusion <folder of the client>/multigpu_diffusion" >&2
    exit 2
fi

if ! command -v make >/dev/null; then
    echo "setup.sh: make is not installed. Install it with the system's package manager and run this again." >&2
    exit 2
fi

make -C "$root" .venv/installed </dev/null
echo "Installed. Start the client with $root/.venv/bin first on PATH, because it runs torchrun from there."
