"""From prompt to weights, for machines: which files an exported folder comes from, by sha256, and who made them with what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import Recipe
from data.store import ROLLUP, RunFolder, read_json, read_rollup, sha256_file
from student.certificate import read_certificate
from student.folders import resolve, weights_sha256

PROVENANCE_FILE = "provenance.json"
CHAIN = ("prompts", "headroom", "traces", "dataset", "checkpoints", "evaluation")
"""Folders whose manifests lead to an export, in the order they were made. A manifest names and hashes every file of its stage,
and the manifests that it was made from."""


def provenance(run: RunFolder, recipe: Recipe, weights: Mapping[str, str]) -> dict[str, Any]:
    """JSON values. weights: exported files, path relative to the run folder -> sha256. `files` resolve inside the run folder:
    `unresolved` says whether they do. `outside` is what a run begins with and does not hold."""
    stages = {}
    files = dict(weights)
    for name in CHAIN:
        folder = run.root / name
        if (rollup := read_rollup(folder)) is None:
            continue
        manifest = f"{name}/{ROLLUP}"
        files[manifest] = sha256_file(folder / ROLLUP)
        stages[rollup.stage] = {
            "manifest": manifest, "fingerprint": rollup.fingerprint, "inputs": rollup.inputs, "counts": rollup.counts,
            "code_revision": rollup.code_revision, "versions": rollup.versions,
        }  # fmt: skip
    for path in (run.config, run.checkpoints / "adapter" / "adapter_model.safetensors"):
        if path.is_file():
            files[str(path.relative_to(run.root))] = sha256_file(path)
    gates = run.evaluation / "gates.json"  # as they were: gates of a finished run may change, and the file with them
    certificate = read_certificate(run, recipe)
    if certificate is not None:
        files["metrics/certificate.json"] = certificate.sha256
    return {
        "run": recipe.name,
        "exported": sorted(weights),
        "files": dict(sorted(files.items())),
        "stages": stages,
        "gates": read_json(gates)["gates"] if gates.is_file() else None,
        "outside": {
            "teacher": {"model": recipe.teacher.model, "licence": recipe.teacher.licence},
            "base": {
                "model": recipe.student.model, "licence": recipe.student.licence,
                "sha256": weights_sha256(resolve(recipe.student.model)),
            },
        },
    }  # fmt: skip


def unresolved(run: RunFolder, said: Mapping[str, Any]) -> list[str]:
    """Files of a provenance that are not in the run folder with that hash: empty for an intact run."""
    return [name for name, sha256 in said["files"].items() if not _is(run.root / name, sha256)]


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256
