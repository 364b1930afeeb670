"""Folders of modular pipelines (modular_model_index.json), as which newer models are published.

Their blocks decide what a call takes, and only the blocks themselves know it: another process asks
them, since the launcher imports no torch.

python -m backends.files.modular CLASS BLOCKS writes the facts of a call as JSON; without a class,
those of all classes.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends.errors import ConfigError
from backends.files.checkpoint import MODULAR_INDEX, Config, is_modular, read_json, with_article
from backends.files.pipeline_calls import PipelineCall, exported_names

ENDING = "ModularPipeline"
LIBRARIES = ("diffusers", "transformers")
GUIDER = "guider"
"""The component that has the scale of guidance. Other pipelines take it with each call."""
INPUTS_OF = {"control_": "controlnet", "controlnet_": "controlnet", "ip_adapter_": "image_encoder"}
"""Beginning of the names of inputs -> the component that reads them, which many folders lack."""
WITHIN_S = 300
"""The other process imports diffusers: seconds, or minutes on a busy machine."""


def modular_call_of(folder: Path) -> tuple[str, PipelineCall]:
    """Return the class of a modular pipeline, and its call.

    ConfigError if its blocks are not in diffusers, or a component is not in the folder.
    """
    assert is_modular(folder)
    index = read_json(folder / MODULAR_INDEX)
    name, blocks = index.get("_class_name"), index.get("_blocks_class_name")
    given = f"--checkpoint={folder}"
    for each in (name, blocks):
        if isinstance(each, str) and each not in exported_names():
            raise ConfigError(
                f"{given} is made of {each}, which the installed diffusers does not have. Code "
                "that comes with a checkpoint is not run. Install a version that has it, or give "
                "another checkpoint."
            )
    if not isinstance(name, str) or not name.endswith(ENDING) or isinstance(blocks, list | dict):
        raise ConfigError(f"{given} names no modular pipeline of diffusers in its {MODULAR_INDEX}.")
    _require_local(folder, index)
    facts = _facts_of(name, blocks or "")
    if not facts:
        raise ConfigError(
            f"{given} is {with_article(name)}, whose blocks do not say what they take. Give "
            "another checkpoint."
        )
    lacking = tuple(
        prefix for prefix, component in INPUTS_OF.items() if not (folder / component).is_dir()
    )
    return name, _call(facts, without=lacking)


@lru_cache(maxsize=1)
def modular_calls() -> dict[str, PipelineCall]:
    """Return the call of each modular pipeline of the installed diffusers."""
    return {name: _call(facts) for name, facts in sorted(_asked().items()) if facts}


def _call(facts: dict[str, Any], *, without: tuple[str, ...] = ()) -> PipelineCall:
    """without: beginnings of the names of inputs that nothing would read."""
    inputs = {key: value for key, value in facts["inputs"].items() if not key.startswith(without)}
    return PipelineCall(
        defaults=MappingProxyType({key: default for key, (default, _) in inputs.items()}),
        annotations=MappingProxyType({key: hint for key, (_, hint) in inputs.items()}),
        returns=tuple(facts["outputs"]),
    )


def _require_local(folder: Path, index: Config) -> None:
    """Raise ConfigError for the first component of another library's class, or whose files are not
    in the folder of its name.
    """
    for component, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 3:
            continue
        facts: dict[str, Any] = entry[2] if isinstance(entry[2], dict) else {}
        # diffusers imports the library of the hint, which need not be the entry's
        hint = facts.get("type_hint") or ["diffusers"]
        if not isinstance(hint, list) or hint[0] not in (*LIBRARIES, None):
            made = ".".join(map(str, hint)) if isinstance(hint, list) else hint
            raise ConfigError(
                f"--checkpoint={folder} makes its {component} from {made}, which is in neither "
                "diffusers nor transformers. Code of a checkpoint is never run: give one whose "
                "classes are in these."
            )
        if entry[0] is None:
            continue
        subfolder = facts.get("subfolder") or ""
        if subfolder != component or not (folder / component).is_dir():
            source = facts.get("pretrained_model_name_or_path") or "nowhere"
            raise ConfigError(
                f"--checkpoint={folder} takes its {component} from {source} (folder "
                f"{subfolder or '.'!r}). All components must be in folders of their names: load it "
                "with diffusers where it runs, and give the folder that save_pretrained writes."
            )


@lru_cache(maxsize=16)
def _facts_of(name: str, blocks: str) -> dict[str, Any]:
    """Return the inputs and outputs of a class's blocks; empty if they cannot be made."""
    return call_facts(name, blocks) if "diffusers" in sys.modules else _asked(name, blocks)


def _asked(*names: str) -> dict[str, Any]:
    """Return what this module writes in another process; empty if that fails."""
    command = [sys.executable, "-m", "backends.files.modular", *names]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            cwd=Path(__file__).parents[2],
            check=True,
        )
        return json.loads(answer.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return {}


def call_facts(name: str, blocks_name: str) -> dict[str, Any]:
    """Return `inputs` (name -> [default, type as text]) and `outputs` (names) of a class's call;
    empty if its blocks are no blocks.

    Defaults that are no JSON are None.
    """
    import diffusers  # imports torch

    try:
        chosen = blocks_name or getattr(diffusers, name).default_blocks_name
        blocks = getattr(diffusers, chosen)()
        inputs = {
            each.name: [_plain(each.default), str(each.type_hint)]
            for each in blocks.inputs
            if each.name is not None
        }
    except (AttributeError, TypeError, ImportError):
        return {}
    for spec in blocks.expected_components:
        if spec.name == GUIDER and "guidance_scale" in (spec.config or {}):
            inputs["guidance_scale"] = [spec.config["guidance_scale"], "float"]
    return {"inputs": inputs, "outputs": list(blocks.output_names)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else None


def main(name: str = "", blocks_name: str = "") -> None:
    every = sorted(each for each in exported_names() if each.endswith(ENDING) and each != ENDING)
    found = (
        call_facts(name, blocks_name) if name else {each: call_facts(each, "") for each in every}
    )
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
