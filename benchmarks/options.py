"""Memory and time of each option on one rank. Prints JSON.

    python -m benchmarks.options [--steps 4] [--images 3] [--only lora,quantize_int8] [--compile]
        [--side 512]

Each row is a process of its own that takes the row's command-line arguments as launcher.py does,
loads a checkpoint of random weights (option_files.py) and generates images. Plain rows are measured
first and again at the end: their spread shows how quiet the machine was. CPU seconds of one thread
are compared, because wall time on a busy machine is meaningless. --compile adds the rows that take
inductor minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import Clock, peak_memory_mb, reset_peak_memory

ROW_TIMEOUT_S = 1800
COMPILE = ("compile_text_encoder", "compile_vae", "compile_unet")


def rows(folder: Path, *, with_compile: bool) -> dict[str, dict[str, Any]]:
    """Return name -> type, launch arguments (besides --type and --checkpoint) and request fields.

    Builds the files in `folder`.
    """
    from benchmarks import option_files as files

    two_loras = {str(files.lora_file("sdxl", folder, seed=seed)): 0.5 for seed in (0, 1)}
    unet: dict[str, Any] = {
        "plain": {},
        "lora_2": {"arguments": [f"--lora={json.dumps(two_loras)}"]},
        "controlnet": {
            "arguments": [f"--control_net={files.controlnet_folder(folder)}"],
            "request": {"control_image": "hint"},
        },
        "ip_adapter": {
            "arguments": [f"--ip_adapter={json.dumps({str(files.ip_adapter_file(folder)): 0.6})}"],
            "request": {"ip_adapter_image": "hint"},
        },
        **{
            f"quantize_{kind}": {"arguments": [f"--quantize_unet_to={kind}"]}
            for kind in ("float8", "int8", "int4", "int2")
        },
        "quantize_bnb_int8": {"arguments": ["--quantize_unet_to=bnb,int8"]},
        "quantize_bnb_nf4": {"arguments": ["--quantize_unet_to=bnb,int4,fp32,fp32,nf4"]},
        **{
            f"gguf_{kind}": {"arguments": [f"--gguf_model={files.gguf_file('sdxl', folder, kind)}"]}
            for kind in ("Q8_0", "Q4_0")
        },
        "compel": {"arguments": ["--compel"], "request": {"prompt": "a (red)1.3 car"}},
        "vae_tiling": {"arguments": ["--enable_vae_tiling"]},
        "vae_slicing": {"arguments": ["--enable_vae_slicing"]},
        "attention_slicing": {"arguments": ["--enable_attention_slicing"]},
        **({name: {"arguments": [f"--{name}"]} for name in COMPILE} if with_compile else {}),
        "step_cache_deep_2": {"arguments": ["--step_cache=deep,2"]},
        "plain_again": {},
    }  # fmt: skip
    transformer: dict[str, Any] = {
        "sd3_plain": {},
        "sd3_quantize_int8": {"arguments": ["--quantize_unet_to=int8"]},
        "sd3_step_cache_first_block": {"arguments": ["--step_cache=first_block,0.3"]},
        "sd3_step_cache_taylor_3": {"arguments": ["--step_cache=taylor,3"]},
        **({"sd3_compile_unet": {"arguments": ["--compile_unet"]}} if with_compile else {}),
        "sd3_plain_again": {},
    }
    return {name: {"type": "sdxl", **row} for name, row in unet.items()} | {
        name: {"type": "sd3", **row} for name, row in transformer.items()
    }


def measure(row: Mapping[str, Any], *, steps: int, images: int, side: int) -> dict[str, Any]:
    """Measure one row in this process: CPU seconds to load and to generate, and memory."""
    import torch

    from backends import backend_class
    from backends.generation.pipeline import load_pipeline
    from backends.groups.mesh import Mesh
    from backends.loading.quantization import weight_bytes
    from backends.model_table import read_table
    from backends.request import GenerateRequest
    from benchmarks import option_files as files
    from hosts.launch.command_line import parse_command_line
    from hosts.launch.start_plan import plan_start

    torch.set_num_threads(1)
    argv = [
        f"--type={row['type']}",
        f"--checkpoint={files.folder_of(row['type'])}",
        *row.get("arguments", ()),
    ]
    start = plan_start(parse_command_line(argv), read_table(), num_gpus=0)
    device = torch.device("cpu")
    reset_peak_memory()
    began = Clock.now()
    pipe = load_pipeline(start.spec, start.load, device=device)
    pipe.attach(
        backend_class(start.plan.method)(
            spec=start.spec, plan=start.plan, mesh=Mesh(start.plan, rank=0, device=device)
        )
    )
    loading = Clock.now().since(began)
    fields = {
        name: files.hint() if value == "hint" else value
        for name, value in row.get("request", {}).items()
    }
    fields = {
        "prompt": "a red car",
        "seed": 1,
        "num_inference_steps": steps,
        "height": side,
        "width": side,
    } | fields
    clocks, report = [], {}
    for _ in range(images):
        began = Clock.now()
        report = pipe.generate(GenerateRequest(**fields)).report
        clocks.append(Clock.now().since(began))
    modules = {
        name: part
        for name, part in pipe.pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    return {
        "arguments": list(row.get("arguments", ())),
        "load_cpu_s": round(loading.cpu_s, 2),
        "first_cpu_s": round(clocks[0].cpu_s, 2),
        "image_cpu_s": round(min(clock.cpu_s for clock in clocks[1:] or clocks), 2),
        "weights_mb": round(sum(weight_bytes(part) for part in modules.values()) / 1e6, 1),
        "peak_mb": peak_memory_mb(),
        **({"step_cache": report["step_cache"]} if "step_cache" in report else {}),
    }


def in_a_process(row: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in a process of its own. A refusal is a result, too."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.options",
        f"--row={json.dumps(row)}",
        f"--steps={options.steps}",
    ]
    command += [f"--images={options.images}", f"--side={options.side}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=ROW_TIMEOUT_S, check=False
    )
    if done.returncode:
        return {
            "arguments": list(row.get("arguments", ())),
            "refused": done.stderr.strip().splitlines()[-1][:300],
        }
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--only", help="names of rows, with commas")
    parser.add_argument(
        "--compile", action="store_true", help="also what inductor needs minutes for"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(
            json.dumps(
                measure(
                    json.loads(options.row),
                    steps=options.steps,
                    images=options.images,
                    side=options.side,
                )
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        wanted = rows(Path(folder), with_compile=options.compile)
        names = options.only.split(",") if options.only else list(wanted)
        results = {}
        for name in names:
            results[name] = in_a_process(wanted[name], options)
            print(
                name, json.dumps(results[name]), file=sys.stderr, flush=True
            )  # so that an interrupted run is not lost
    for name, result in results.items():
        plain = results.get("sd3_plain" if name.startswith("sd3_") else "plain")
        if plain and "image_cpu_s" in result:
            result["image_ratio"] = round(result["image_cpu_s"] / plain["image_cpu_s"], 2)
            result["peak_more_mb"] = round(result["peak_mb"] - plain["peak_mb"], 1)
    print(json.dumps({"steps": options.steps, "side": options.side, "rows": results}, indent=2))


if __name__ == "__main__":
    main()
