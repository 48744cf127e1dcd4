"""Reaching the hub: which revision, and if it cannot be reached, why and what to do."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm_calib_plugin import registry
from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.corpora import CORPORA
from lm_calib_plugin.errors import UserError, listed

SITE = "https://huggingface.co/datasets"


def connection_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions that mean "no answer", of whichever client the hub library uses."""
    from huggingface_hub import errors

    found: list[type[BaseException]] = [ConnectionError, TimeoutError]
    for module, name in (("httpx2", "TransportError"), ("httpx", "TransportError")):
        with contextlib.suppress(ImportError, AttributeError):
            found.append(getattr(importlib.import_module(module), name))
    for name in ("OfflineModeIsEnabled", "LocalEntryNotFoundError"):
        with contextlib.suppress(AttributeError):
            found.append(getattr(errors, name))
    return tuple(found)


class HubAnswer(NamedTuple):
    """Commit of a revision, and the license that the data set card states."""

    revision: str
    licence: str | None


def ask_hub(path: str, revision: str | None) -> HubAnswer:
    """Look a data set up on the hub (network)."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(path, revision=revision, timeout=30)
    stated = getattr(info.card_data, "license", None)
    if isinstance(stated, list):
        stated = ", ".join(map(str, stated))
    return HubAnswer(str(info.sha), stated or None)


def look_up(
    path: str, revision: str | None, pinned: str | None = None, name: str = "hf"
) -> HubAnswer | None:
    """Return what to load, or None when the hub is away but an earlier download is here.

    Parameters
    ----------
    path
        ``ORG/NAME``.
    revision
        What the user asked for.
    pinned
        Commit taken when the user asked for none; None: the newest one. An earlier download is
        taken in place of a pinned commit, never of one that the user asked for.
    name
        How the user called the data set.

    Raises
    ------
    UserError
        Says which it is: offline, no such data set (or a private one), gated, no such revision.
    """
    from huggingface_hub import errors

    no_answer: tuple[type[BaseException], ...] = (*connection_errors(), errors.HfHubHTTPError)
    try:
        return ask_hub(path, revision or pinned)
    except errors.GatedRepoError:
        raise _gated(path) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            ARGUMENT,
            f"hf:{path} has no revision `{revision or pinned}`",
            f"see {SITE}/{path}/commits/main",
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            ARGUMENT,
            f"the hub has no data set `{path}` that you may see",
            "a typing error? A private one needs a login: hf auth login",
            f"look for it at {SITE}?search={path.rsplit('/', 1)[-1]}",
        ) from None
    except no_answer as error:
        if in_local_cache(path) and revision is None:
            return None
        raise _unreachable(path, error, name) from None


def in_local_cache(path: str) -> bool:
    """Tell whether the data set library keeps an earlier download of this data set."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = path.rpartition("/")
    for spelled in (name, camelcase_to_snakecase(name)):
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "___".join(
            filter(None, (owner, spelled))
        )
        if folder.is_dir() and any(folder.iterdir()):
            return True
    return False


def usable_now() -> str:
    """Say in one sentence which sources need no network, corpora downloaded earlier included."""
    found = [name for name, row in CORPORA.items() if in_local_cache(row.dataset)]
    cached = f", and from earlier downloads {listed(found)}" if found else ""
    kept = "set:DIR, " if "set" in registry.table("calibration") else ""
    return (
        "usable without network: calibration=self, null:KIND, random, file:PATH, hf:./FOLDER, "
        f"{kept}task:NAME with local data{cached}"
    )


def open_local(folder: Path, config: str | None, split: str) -> Any:
    """Return a split of a local folder: data files, or what ``save_to_disk`` wrote."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(folder))
        if split not in splits:
            raise UserError(
                ARGUMENT,
                f"hf:{folder} has no split `{split}`",
                f"splits: {', '.join(splits)}",
                f"write hf:{folder}::{next(iter(splits))}",
            )
        return splits[split]
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(str(folder), config, split=split)


@contextlib.contextmanager
def explained(path: str, config: str | None, split: str) -> Iterator[None]:
    """Turn what the data set library raises into a short message."""
    try:
        yield
    except UserError:
        raise
    except connection_errors() as error:
        raise _unreachable(path, error) from None
    except (ValueError, FileNotFoundError) as error:
        # The hub describes a gated data set to everyone and refuses its files only.
        if "gated" in str(error).lower():
            raise _gated(path) from None
        # Unknown or missing config and split arrive as ValueError; their text lists what is there.
        raise UserError(
            ARGUMENT,
            f"hf:{path} (config `{config or 'default'}`, split `{split}`): {one_line(error)}",
            "hf:ORG/NAME[:config][:split][:column]",
        ) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("datasets", "huggingface_hub"):
            raise
        raise UserError(ARGUMENT, f"hf:{path} cannot be read: {one_line(error)}") from None


def one_line(error: BaseException, length: int = 300) -> str:
    """Return the text of an error on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


def _gated(path: str) -> UserError:
    return UserError(
        ARGUMENT,
        f"hf:{path} is gated",
        f"accept its terms at {SITE}/{path}",
        "then log in: hf auth login",
    )


def _unreachable(path: str, error: BaseException, name: str = "hf") -> UserError:
    own = f"your copy of it: {name}?path=FILE, or " if name in CORPORA else ""
    return UserError(
        ARGUMENT,
        ("" if name == "hf" else f"{name}: ")
        + f"hf:{path} cannot be reached (offline? {one_line(error, 120)})",
        usable_now(),
        f"{own}where there is network: hf download {path} --repo-type dataset --include FILES "
        "--local-dir FOLDER, then hf:./FOLDER",
    )
