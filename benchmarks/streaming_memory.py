"""Peak memory of compressing a model that stays on a disk, beside what there is no way around.

For every depth a model of equal random blocks is written, one block a file, and compressed in a
process of its own: whole in memory, or offloaded to a disk. Printed are JSON rows:

- ``peak_mib``: peak of the process (on a GPU: of its memory) beyond what it had before the model
  was loaded, and after a small model had been compressed once;
- ``floor_mib``: largest block, statistics of its inputs, hidden states of all sequences, and the
  activations of one chunk in a block; ``model_mib`` the whole model;
- ``seconds``: of the compression.

    python benchmarks/streaming_memory.py --depths 8 16 --hidden 512 --out rows.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY = 512
MIB = 2**20


def config_of(depth: int, hidden: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def write_model(folder: Path, depth: int, hidden: int) -> None:
    """Write a model without ever having more than one block in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    state = LlamaForCausalLM(config_of(1, hidden)).state_dict()
    files = {}
    for index in range(-1, depth):
        own = {n: t for n, t in state.items() if (".layers." in n) == (index >= 0)}
        own = {n.replace("layers.0.", f"layers.{index}."): t.contiguous() for n, t in own.items()}
        name = f"part-{index + 1}.safetensors"
        save_file(own, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = config_of(depth, hidden)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def floor_bytes(hidden: int, sequences: int, length: int, chunk: int, gram: bool) -> int:
    """Return bytes of a block, its statistics, all hidden states and one chunk's activations."""
    inner = 4 * hidden
    block = 4 * (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden)
    inputs = [hidden, hidden, hidden, inner]
    statistics = sum(4 * (width * width if gram else width) for width in inputs)
    tokens = chunk * length
    activations = 4 * tokens * (2 * hidden + 3 * inner)
    return block + statistics + 4 * sequences * length * hidden + activations


def peak_bytes() -> int:
    """Return the most memory this process had since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak() -> int:
    """Start counting anew; return what the process has now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compress one model in this process, after a small one."""
    import gc

    import torch
    from transformers import AutoModelForCausalLM

    from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress

    recipe = Recipe(method=options.method, sparsity=0.5)
    generator = torch.Generator().manual_seed(0)

    def once(folder: Path, sequences: int, **placement: Any) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **placement)
        forget_peak()  # what loading took for a moment is not counted
        ids = torch.randint(VOCABULARY, (sequences, options.length), generator=generator)
        data = CalibrationSet.of(list(ids), seqlen=options.length)
        runtime = Runtime(
            progress=False, calib_batch_size=options.chunk, report_dir=f"{options.folder}/reports"
        )
        start = time.perf_counter()
        compress(model, None, recipe, runtime, data)
        return time.perf_counter() - start

    place, cuda = {}, options.device == "cuda"
    if options.where == "disk":
        place = {"device_map": {"": "disk"}, "offload_folder": f"{options.folder}/offload"}
        if cuda:
            # The embeddings say where the model computes.
            place["device_map"] = {"model.embed_tokens": 0, "model.layers": "disk"}
            place["device_map"] |= {"model.norm": 0, "lm_head": 0, "model.rotary_emb": 0}
    elif cuda:
        place = {"device_map": {"": 0}}
    once(Path(options.folder) / "small", 2 * options.chunk)
    gc.collect()
    before = forget_peak()
    if cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    seconds = once(Path(options.folder) / "model", options.sequences, **place)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_bytes()
    return {"peak_mib": round((peak - before) / MIB, 1), "seconds": round(seconds, 2)}


def row_of(options: argparse.Namespace, depth: int, where: str, folder: str) -> dict[str, Any]:
    """Return one row, measured in a process of its own."""
    kept = ["method", "hidden", "sequences", "length", "chunk", "device"]
    words = [f"--{name}={getattr(options, name)}" for name in kept]
    command = [sys.executable, __file__, *words, f"--where={where}", f"--folder={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    floor = floor_bytes(
        options.hidden,
        options.sequences,
        options.length,
        options.chunk,
        options.method not in ("wanda", "magnitude"),
    )
    size = sum(p.stat().st_size for p in (Path(folder) / "model").glob("*.safetensors"))
    return {
        "method": options.method,
        "depth": depth,
        "where": where,
        "device": options.device,
        **json.loads(done.stdout.splitlines()[-1]),
        "floor_mib": round(floor / MIB, 1),
        "model_mib": round(size / MIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out")
    parser.add_argument("--where", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.where:
        print(json.dumps(measure(options)))
        return
    rows = []
    for depth in options.depths:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", depth, options.hidden)
            write_model(Path(folder) / "small", 2, 64)
            for where in ("memory", "disk"):
                rows.append(row_of(options, depth, where, folder))
                print(json.dumps(rows[-1]), flush=True)
    if options.out:
        from machine import facts

        content = {"machine": facts(), "rows": rows}
        Path(options.out).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
