"""The tokenizer that belongs to a model: from the very files its weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.integrations.arguments import load_tokenizer

# Where code of models lives that came with a checkpoint and was allowed to run.
_REMOTE = "transformers_modules."


def tokenizer_of_files(model: Any, files: Sequence[str] | None) -> Any:
    """Return the tokenizer beside the weights of a model that is being loaded.

    ``from_pretrained`` tells a quantizer neither revision nor subfolder nor cache; the paths of
    the weights say all three.

    Parameters
    ----------
    model
        As transformers hands it over, without weights.
    files
        Paths of its weights; None where they do not come from files.

    Raises
    ------
    UserError
        When there is none beside the weights, or it can not be known where it would be.
    """
    if not files:
        return tokenizer_of(model)
    folder = Path(files[0]).parent
    if Path(model.name_or_path).is_dir():
        # As it was named, where that is the same folder: this is what errors show.
        at_root = folder.resolve() == Path(model.name_or_path).resolve()
        return load_tokenizer(model.name_or_path if at_root else str(folder), **_trust(model))
    for inside, place in enumerate(folder.parents):
        # The cache of the hub: CACHE/models--ORG--NAME/snapshots/COMMIT/SUBFOLDER
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            commit, *subfolder = folder.parts[-inside - 1 :]
            return load_tokenizer(
                model.name_or_path,
                revision=commit,
                subfolder="/".join(subfolder),
                cache_dir=str(place.parents[1]),
                **_trust(model),
            )
    raise _unknown(f"the weights come from {folder}, which is not `{model.name_or_path}`")


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer of a model in memory, by the name it was loaded under.

    Raises
    ------
    UserError
        When it has no name, or the name alone does not lead to it.
    """
    name = str(getattr(model, "name_or_path", None) or "")
    if not name:
        raise _unknown("the model does not say where it comes from")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise _unknown(f"`{name}` has no config.json, so the model comes from a folder inside")
    # transformers before 5.23 notes the commit that a model of the hub was loaded at.
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    revision = {} if commit is None or Path(name).is_dir() else {"revision": commit}
    return load_tokenizer(name, **revision, **_trust(model))


def _trust(model: Any) -> dict[str, bool]:
    """Code of the checkpoint may run for its tokenizer if it was allowed to for the model."""
    return {"trust_remote_code": type(model).__module__.startswith(_REMOTE)}


def _unknown(why: str) -> UserError:
    return UserError("tokenizer", why, "the tokenizer of the model", "give tokenizer=")
