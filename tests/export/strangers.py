"""Folders loaded by a process that can not import this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# `-S` keeps start-up files from running; what is on the path here is given by hand.
CODE = """
import json, sys
task = json.loads(sys.argv[1])

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lm_calib_plugin":
            raise ImportError("blocked: this process must do without it")

sys.meta_path.insert(0, Blocked())
sys.path += task["path"]
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

found = {}
for name, folder in task["folders"].items():
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = [k for k, v in info.items() if v and k != "error_msgs"]
    assert not wrong, (name, info)
    ids = torch.tensor(task["ids"])
    with torch.no_grad():
        found[name] = model(ids, use_cache=False).logits.float().contiguous()
assert not any(name.startswith("lm_calib_plugin") for name in sys.modules)
save_file(found, task["out"])
"""


def logits_elsewhere(folders: Mapping[str, Path], ids: Tensor, out: Path) -> dict[str, Tensor]:
    """Return what plain transformers makes of ``ids``, for every folder, by name."""
    here = str(Path(__file__).parents[2])
    path = [p for p in sys.path if p and Path(p).is_dir() and str(Path(p).resolve()) != here]
    task = {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "ids": ids.tolist(),
        "out": str(out),
        "path": path,
    }
    command = [sys.executable, "-S", "-c", CODE, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


def probe(rows: int = 2, length: int = 24, vocabulary: int = 97) -> Tensor:
    """Return ids to compare on."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(5))
