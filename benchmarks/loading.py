"""Main memory that a rank takes while it loads, and how long that lasts. Prints JSON. Linux.

    python -m benchmarks.loading [--ranks 2] [--only same_dtype,int8] [--scale 1.0]

The checkpoint has random weights, in bfloat16: an SD3-like transformer of 600 MB and a T5 of
400 MB; the other components are the tests' tiny ones. Each rank is a process of its own. It takes
the row's command-line arguments as launcher.py does, and loads. Private memory is what the kernel
calls anonymous: pages of mapped files are shared by all ranks and can be dropped at any time, so
they do not count. `above_mb` is the peak above what stays when the pipeline is loaded. Where a
method cuts the denoiser's weights, that includes an image of one step, in which asyncdiff cuts.
"""

import argparse
import json
import multiprocessing
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.option_files import write_gguf

SAMPLE_EVERY_S = 0.002
TRANSFORMER = {
    "sample_size": 64,
    "num_layers": 8,
    "num_attention_heads": 16,
    "attention_head_dim": 64,
    "caption_projection_dim": 1024,
    "pos_embed_max_size": 64,
}
"""Fields of the transformer's configuration that differ from the tests' tiny one."""
T5_LAYERS, T5_FF = 12, 170_000


def make_checkpoint(folder: Path, scale: float) -> Path:
    """Write the checkpoint, `scale` times as large, and return its folder."""
    import shutil

    import torch
    from transformers import T5Config, T5EncoderModel

    from tests.checkpoints import checkpoint

    layers = max(1, round(TRANSFORMER["num_layers"] * scale))
    source = checkpoint("sd3", **(TRANSFORMER | {"num_layers": layers}))
    shutil.copytree(source, folder)
    from diffusers import SD3Transformer2DModel

    SD3Transformer2DModel.from_pretrained(source / "transformer").to(
        torch.bfloat16
    ).save_pretrained(folder / "transformer")
    config = T5Config.from_pretrained(folder / "text_encoder_3")
    config.num_layers, config.d_ff = max(1, round(T5_LAYERS * scale)), T5_FF
    torch.manual_seed(0)
    T5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder / "text_encoder_3")
    return folder


def rows(folder: Path, *, scale: float) -> dict[str, list[str]]:
    """Return name -> launch arguments. Builds the files in `folder`."""
    base = make_checkpoint(folder / "sd3", scale)
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    plain = ["--type=sd3", f"--checkpoint={base}", "--backend=xdit", "--variant=bf16"]
    converted = [*plain[:-1], "--variant=fp16"]
    return {
        "same_dtype": plain,
        "converted": converted,
        "int8": [*plain, "--quantize_to=int8"],
        "converted_int8": [*converted, "--quantize_to=int8"],
        "gguf_q8": [*plain, f"--gguf_model={write_gguf(weights, folder / 'q8.gguf', 'Q8_0')}"],
        "sharded": [*plain, "--shard=always"],
        "sharded_converted": [*converted, "--shard=always"],
        "sharded_int8": [*plain, "--quantize_to=int8", "--shard=always"],
        "stages": [*converted, "--pipefusion_parallel_degree=2"],
        "segments": [*converted, "--backend=asyncdiff", "--shard_weights"],
        "scaled_fp8": [
            *plain,
            f"--transformer={write_scaled(weights, folder / 'fp8.safetensors')}",
        ],
    }


def write_scaled(source: Path, path: Path) -> Path:
    """Write matrices as float8 with one scale each, as the files of fp8 models are published."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(source).items():
        if tensor.dim() == 2 and name.endswith(".weight"):
            scale = tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
        else:
            tensors[name] = tensor
    save_file(tensors, path)
    return path


def private_bytes(process_id: int | str = "self") -> int:
    """Return a process's private memory in bytes: what no file backs."""
    text = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", text)[1])


def encoded_prompt(config: Any) -> dict[str, Any]:
    """Return embeddings of zeros. The T5 is so wide that a prompt would take hundreds of MB."""
    import numpy as np

    return {
        "prompt_embeds": np.zeros((1, 8, config.joint_attention_dim), np.float32),
        "pooled_prompt_embeds": np.zeros((1, config.pooled_projection_dim), np.float32),
    }


def load_one(argv: Sequence[str], rank: int, ranks: int, meeting: str, parent: Connection) -> None:
    """Load one rank's pipeline in this process and report. meeting: a file that all ranks share."""
    import torch
    import torch.distributed as dist

    from backends import backend_class
    from backends.generation.pipeline import load_pipeline
    from backends.groups.mesh import Mesh
    from backends.model_table import read_table
    from backends.request import GenerateRequest
    from hosts.launch.command_line import parse_command_line
    from hosts.launch.start_plan import plan_start

    torch.set_num_threads(1)
    start = plan_start(parse_command_line(argv), read_table(), num_gpus=0, num_ranks=ranks)
    device, is_cut = torch.device("cpu"), bool(start.plan.splits_weights_by)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    parent.send("ready")
    parent.recv()
    before, began = private_bytes(), time.perf_counter()
    pipe = load_pipeline(start.spec, start.load, device=device, share=(rank, ranks), is_cut=is_cut)
    if is_cut:
        mesh = Mesh(start.plan, rank=rank, device=device)
        pipe.attach(backend_class(mesh.plan.method)(spec=start.spec, plan=start.plan, mesh=mesh))
        pipe.generate(
            GenerateRequest(
                **encoded_prompt(pipe.pipe.transformer.config),
                guidance_scale=1.0,
                seed=0,
                num_inference_steps=1,
                height=64,
                width=64,
            )
        )
    seconds = time.perf_counter() - began
    largest = max(
        tensor.numel() * tensor.element_size()
        for part in pipe.pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for tensor in part.parameters()
    )
    parent.send(
        {"before": before, "stays": private_bytes(), "largest": largest, "seconds": seconds}
    )
    parent.recv()
    dist.destroy_process_group()


def measure(argv: Sequence[str], ranks: int) -> dict[str, Any]:
    """Load on all ranks at once, and sample their memory from outside."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(ranks)]
    meeting = str(Path(tempfile.mkdtemp()) / "meeting")
    children = [
        context.Process(target=load_one, args=(list(argv), rank, ranks, meeting, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for child, (_, theirs) in zip(children, pipes, strict=True):
        child.start()
        theirs.close()  # so that a rank that fails ends the benchmark
    for ours, _ in pipes:
        ours.recv()
    peaks, is_done = [0] * ranks, threading.Event()

    def sample() -> None:
        while not is_done.wait(SAMPLE_EVERY_S):
            for rank, child in enumerate(children):
                peaks[rank] = max(peaks[rank], private_bytes(child.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    for ours, _ in pipes:
        ours.send("load")
    found = [ours.recv() for ours, _ in pipes]
    is_done.set()
    sampler.join()
    for ours, _ in pipes:
        ours.send("end")
    for child in children:
        child.join()
    return _summary(found, peaks)


def _summary(found: Sequence[Mapping[str, float]], peaks: Sequence[int]) -> dict[str, Any]:
    """Return the worst rank's figures, in MB of 10^6 bytes, above what it had before loading."""
    worst = max(range(len(found)), key=lambda rank: peaks[rank] - found[rank]["stays"])
    facts = found[worst]
    above = peaks[worst] - facts["stays"]
    return {
        "stays_mb": round((facts["stays"] - facts["before"]) / 1e6),
        "peak_mb": round((peaks[worst] - facts["before"]) / 1e6),
        "above_mb": round(above / 1e6),
        "largest_tensor_mb": round(facts["largest"] / 1e6),
        "seconds": round(max(one["seconds"] for one in found), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", help="names of rows, with commas")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is a checkpoint of 1 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wanted = rows(Path(folder), scale=options.scale)
        for name in options.only.split(",") if options.only else wanted:
            print(name, json.dumps(measure(wanted[name], options.ranks)), flush=True)


if __name__ == "__main__":
    main()
