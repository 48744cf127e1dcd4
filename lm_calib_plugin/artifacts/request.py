"""The name of a result before it is known: everything that decides it, as it was asked for."""

from __future__ import annotations

from typing import Any

from lm_calib_plugin import engine, registry, storage
from lm_calib_plugin.storage import version_of
from lm_calib_plugin.work import Job

# Raised whenever results of this package change without a new revision of a method.
REQUEST_VERSION = 1
PACKAGES = ("lm-calib-plugin", "torch", "transformers", "scipy")


def asked(job: Job) -> dict[str, Any]:
    """Return plain values that decide the weights and the report, before any work.

    More than the recipe key knows: what only changes the report (the data that errors of a method
    without data are measured on) is here, too, and what decides last bits of sums: the class of
    hardware, threads, how many sequences a chunk has, and how many processes divide them. Less than
    the key knows of what the work finds (shares of an allocation, widths of ``bits=auto``): of
    these, what was asked for.
    ``execution`` is not here: an artifact holds the simulated model, from which kernels are made.
    """
    recipe, method, calibration = job.recipe, job.method, job.calibration
    return {
        "request_version": REQUEST_VERSION,
        "model": job.dense_digest,
        **engine.circumstances(job.model),
        "block_path": job.blocks.path,
        "method": [recipe.entry.kind, None if recipe.stages else recipe.method],
        "revision": method.revision,
        "options": method.options(),
        "identity": method.identity(),
        "overrides": {n: [m.revision, m.options()] for n, m in job.treated.items()},
        "sparsity": recipe.sparsity,
        "bits": recipe.bits,
        "layers": storage.digest(job.names),
        "untie": recipe.untie,
        "propagate": recipe.propagate,
        "true_sequential": recipe.true_sequential,
        "exclude_first_token": recipe.exclude_first_token,
        "calib_id": None if calibration is None else calibration.calib_id,
        "heldout": job.held,
        "chunk": job.chunk_size,
        "versions": _versions(job),
        **({"processes": job.ranks.count} if job.ranks.several else {}),
    }


def request_key(content: dict[str, Any]) -> str:
    """Return the name of an artifact: the sha256 of what was asked."""
    return storage.digest(content)


def _versions(job: Job) -> dict[str, str]:
    """Return versions of what computes, those of other people's methods and parts among them."""
    recipe = job.recipe
    rows = [recipe.entry, *recipe.parts()]
    others = {row.distribution for row in rows if row.distribution != registry.OURS}
    found = {}
    for package in (*PACKAGES, *sorted(others)):
        found[package] = version_of(package) or "not installed"
    return found
