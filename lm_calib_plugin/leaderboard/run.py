"""Measures cells, one after another, in one process; what they share is done once.

The only file of this room that meets lm_eval: base models, tasks and requests live here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch.utils import collect_env

from lm_calib_plugin import engine
from lm_calib_plugin._autoload import register
from lm_calib_plugin.builtin_models import resolve_pretrained
from lm_calib_plugin.calibration.tokens import tokenizer_digest
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.local import place_of
from lm_calib_plugin.leaderboard.records import DONE, FAILED, NAME_LENGTH, Record, without_times
from lm_calib_plugin.leaderboard.requests import SharedRequests
from lm_calib_plugin.leaderboard.scores import no_score, task_result
from lm_calib_plugin.leaderboard.sharing import Expected
from lm_calib_plugin.storage import digest, own_version, version_of

# Arguments that only matter while a model is loaded: a model in memory has them behind it.
WHILE_LOADING = (
    "pretrained", "tokenizer", "revision", "subfolder", "dtype", "peft", "delta", "device",
    "use_fast_tokenizer", "attn_implementation", "cache_dir", "code_revision", "variant",
    "experts_implementation", "force_download", "local_files_only", "low_cpu_mem_usage", "proxies",
    "token", "use_safetensors",
)  # fmt: skip
# With these a model lies on several devices, and can not be copied.
SPREAD = ("parallelize", "max_memory_per_gpu", "offload_folder")
# What of a summary depends on when and where it was made.
_BY_THE_CLOCK = ("evaluation", "peak_memory_gib", "report_file", "cache", "exported")
VERSIONS = ("lm-eval", "transformers", "torch", "datasets")


class Bench:
    """Where cells are measured: it holds one base model, the tasks, and statistics that are shared.

    Parameters
    ----------
    logs
        Folder for what is printed while a cell is measured; None: it is printed.
    runtime
        Further arguments of the compression that can not change its result.
    cells
        Cells that may be measured here: one pass watches what those need together that share it.
    """

    def __init__(
        self,
        logs: Path | None = None,
        runtime: Mapping[str, Any] | None = None,
        cells: Iterable[Cell] = (),
    ) -> None:
        self.logs, self.runtime = logs, dict(runtime or {})
        self._expected = Expected(cells)
        self._base: tuple[str, HFLM] | None = None
        self._tasks: tuple[str, LoadedTasks] | None = None
        self._shared = engine.Shared()
        register()

    def measure(self, cell: Cell) -> Record:
        """Measure a cell; what goes wrong is in the record."""
        start = time.perf_counter()
        # A repeat has to show that the same comes out from the start, so it shares nothing.
        shared = engine.Shared() if cell.repeat else self._shared
        with self._output(cell), engine.share_in(shared):
            try:
                shared.expect(self._expected.kinds(cell))
                record = self._measured(cell)
                record.to_text()
                return record
            except Exception as error:
                # A broken cell must not stop the others.
                traceback.print_exc()
                return failed(cell, describe(error), time.perf_counter() - start)
            finally:
                self._expected.done(cell)

    @contextlib.contextmanager
    def _output(self, cell: Cell) -> Iterator[None]:
        """Send what is printed to the log of the cell."""
        if self.logs is None:
            yield
            return
        self.logs.mkdir(parents=True, exist_ok=True)
        with (
            (self.logs / f"{cell.key[:NAME_LENGTH]}.log").open("w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            _programs_write_to(log),
        ):
            yield

    def _measured(self, cell: Cell) -> Record:
        seconds: dict[str, float] = {}
        with _timed(seconds, "tasks"):
            tasks = self._loaded_tasks(cell)
            tasks.requests.serve(digest(dict(cell.loading)))
        with _timed(seconds, "model"):
            model = self._model(cell, seconds)
        with _timed(seconds, "evaluation"), _environment_once():
            results = simple_evaluate(
                model=model,
                tasks=tasks.objects,
                task_manager=tasks.manager,
                log_samples=True,
                **_settings(cell),
            )
        found = {
            # A task out of a file has a name of its own there.
            name: task_result(leaves, results, leaves[0] if len(leaves) == 1 else name, choices)
            for name, (leaves, choices) in tasks.parts.items()
        }
        summary = results["config"].get("compression")
        conditions = {
            "model": (summary or {}).get("model_digest") or engine.model_digest(model.model),
            "lm_eval": version_of("lm-eval"),
            "tokenizer": tokenizer_digest(model.tokenizer),
            "chat_template": _chat_template(model, cell),
            "settings": cell.identity()["harness"],
        }
        seconds |= {
            f"compression.{k}": v for k, v in ((summary or {}).get("seconds") or {}).items()
        }
        return Record(
            key=cell.key,
            cell=place_of(cell),
            identity=cell.identity(),
            status=DONE,
            compression=None if summary is None else _lasting(summary),
            conditions=conditions,
            tasks=found,
            costs=_costs(seconds, summary),
        )

    # --- what cells share ------------------------------------------------------------------

    def _loaded_tasks(self, cell: Cell) -> LoadedTasks:
        """Return the tasks of a cell; data sets are read once."""
        include = cell.harness.get("include_path")
        name = digest([cell.tasks, include])
        if self._tasks is None or self._tasks[0] != name:
            self._tasks = (name, load_tasks(cell.tasks, include))
        return self._tasks[1]

    def _model(self, cell: Cell, seconds: dict[str, float]) -> Any:
        """Return the model of a cell, compressed, as an object of the harness."""
        kind = get_model(cell.model_class)
        beside = {k: cell.harness.get(k) for k in ("batch_size", "max_batch_size", "device")}
        ours = {**(cell.recipe or {}), **(self.runtime if cell.recipe is not None else {})}
        if any(cell.loading.get(name) for name in SPREAD):
            arguments = {**cell.loading, **ours}
            if cell.recipe is None:
                arguments["pretrained"] = resolve_pretrained(arguments["pretrained"])
            return kind.create_from_arg_obj(arguments, beside)
        with _timed(seconds, "base"):
            base = self._loaded_base(cell.loading)
        device = beside.pop("device") or cell.loading.get("device")
        model = copy.deepcopy(base.model).to(_place(device))
        rest = {k: v for k, v in cell.loading.items() if k not in WHILE_LOADING}
        return kind.create_from_arg_obj(
            {"pretrained": model, "tokenizer": copy.deepcopy(base.tokenizer), **rest, **ours},
            beside,
        )

    def _loaded_base(self, loading: Mapping[str, Any]) -> HFLM:
        """Return the dense model, on the CPU, loaded the way the harness does."""
        name = digest(dict(loading))
        if self._base is None or self._base[0] != name:
            self._base = None
            arguments = {**loading, "device": "cpu"}
            arguments["pretrained"] = resolve_pretrained(arguments["pretrained"])
            base = HFLM(**arguments)
            if loading.get("peft"):
                base._model = base._model.merge_and_unload()
            self._base = (name, base)
        return self._base[1]


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks, or groups of them, as objects of the harness.

    ``parts`` holds, by the name asked for, the names of single tasks and whether all of these are
    choices between answers.
    """

    objects: list[Any]
    parts: dict[str, tuple[list[str], bool]]
    manager: Any
    requests: SharedRequests


def load_tasks(names: tuple[str, ...], include: str | None) -> LoadedTasks:
    """Load tasks by name, or from YAML files, as ``lm_eval --tasks`` does.

    Raises
    ------
    UserError
        For names and files that there are not.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    plain = [name for name in names if name not in files]
    # The list of all tasks takes a minute to read; own tasks do not need it.
    manager = TaskManager(include_path=include, include_defaults=False)
    if any(not manager.match_tasks([name]) for name in plain):
        manager = TaskManager(include_path=include)
    unknown = [name for name in plain if not manager.match_tasks([name])]
    unknown += [name for name in files if not Path(name).is_file()]
    if unknown:
        raise UserError("tasks", f"not found: {listed(unknown)}", "see lm_eval ls tasks")
    objects: list[Any] = []
    parts: dict[str, tuple[list[str], bool]] = {}
    single: list[Any] = []
    for name in names:
        loaded = manager.load([load_yaml(name) if name in files else name])
        groups = loaded["groups"]
        inside = {child for group in groups.values() for child in group.child_names}
        top = [group for key, group in groups.items() if key not in inside]
        leaves = sorted(loaded["tasks"])
        summed = all(group.aggregate_metric_list for group in top) if top else len(leaves) == 1
        if not summed or len(top) > 1:
            raise no_score(name, leaves)
        objects.extend(top or loaded["tasks"].values())
        single.extend(loaded["tasks"].values())
        kinds = {task.OUTPUT_TYPE for task in loaded["tasks"].values()}
        parts[name] = (leaves, kinds == {"multiple_choice"})
    return LoadedTasks(objects, parts, manager, SharedRequests(single))


def failed(cell: Cell, error: str, seconds: float = 0.0) -> Record:
    """Return the record of a cell that could not be measured."""
    costs = _costs({"failed": seconds}, None)
    return Record(cell.key, place_of(cell), cell.identity(), FAILED, error=error, costs=costs)


def describe(error: Exception) -> str:
    """Return an error on one line, with its kind where that is no message to users."""
    text = " ".join(str(error).split())[:600]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _settings(cell: Cell) -> dict[str, Any]:
    """Return what of the harness' arguments an evaluation gets."""
    settings = dict(cell.harness)
    for name in ("device", "include_path", "max_batch_size"):
        settings.pop(name, None)
    seeds = settings.pop("seed", None)
    if seeds is not None:
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        each = seeds if isinstance(seeds, list) else [seeds] * len(names)
        settings |= dict(zip(names, each, strict=True))
    return {**settings, "bootstrap_iters": 0}


def _chat_template(model: Any, cell: Cell) -> str | None:
    wanted = cell.harness.get("apply_chat_template")
    return digest(model.chat_template(wanted)) if wanted else None


def _place(device: Any) -> torch.device:
    if device:
        return torch.device(str(device))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _lasting(summary: Mapping[str, Any]) -> dict[str, Any]:
    return dict(without_times({k: v for k, v in summary.items() if k not in _BY_THE_CLOCK}))


def _costs(seconds: Mapping[str, float], summary: Mapping[str, Any] | None) -> dict[str, Any]:
    machine = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "evaluation": (summary or {}).get("evaluation"),
        "peak_memory_gib": (summary or {}).get("peak_memory_gib"),
        "machine": machine,
        "versions": {p: version_of(p) for p in VERSIONS} | {"lm-calib-plugin": own_version()},
    }


@contextlib.contextmanager
def _environment_once() -> Iterator[None]:
    """Spare a list of all installed packages, made by other processes, for every cell."""
    before = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = _environment
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = before


@functools.cache
def _environment(listing: Callable[[], str] = collect_env.get_pretty_env_info) -> str:
    return listing()


@contextlib.contextmanager
def _programs_write_to(log: TextIO) -> Iterator[None]:
    """Send errors of other programs to a file, too: the harness asks git and others."""
    before = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
