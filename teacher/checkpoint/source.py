"""Which checkpoint was prepared: its files' hashes, its fingerprint, and the commit it was downloaded from."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configs.errors import UnusableInput
from configs.progress import Count, Report
from data.store import read_json, sha256_file, write_json
from teacher.checkpoint.manifest import FileSum, Source, fingerprint_of
from teacher.folders import identity_files, resolve_model

SUMS = "source.json"
REPOSITORY = Path(__file__).parents[2]
ARCHITECTURES = REPOSITORY / "configs/architectures"


def checkpoint_folder(model: str) -> Path:
    """The folder of the weights that `teacher.model` means.

    Raises:
        UnusableInput: as `resolve_model`; or one of the shipped architectures, which recipes name to be planned from anywhere.
    """
    named = Path(model) if Path(model).is_dir() else REPOSITORY / model
    if named.is_dir() and named.resolve().is_relative_to(ARCHITECTURES):
        raise UnusableInput(
            f"teacher.model {model}: an architecture without weights, enough to plan by; set the checkpoint's folder: "
            "-s teacher.model=FOLDER"
        )
    return resolve_model(model)


def describe_source(folder: Path, output: Path, report: Report) -> Source:
    """Every file that decides what the model answers, hashed. A file whose size and time of change are those of its last
    hashing for `output` is not read again: 750 GB take ten minutes."""
    known = read_json(output / SUMS) if (output / SUMS).is_file() else {}
    paths = identity_files(folder)
    stamps = {path.name: _stamp(path) for path in paths}
    done, total = 0, sum(size for size, _ in stamps.values())

    def hash_of(path: Path) -> str:
        *stamp, sha256 = known.get(path.name, [None])
        return sha256 if stamp == list(stamps[path.name]) else sha256_file(path)

    sums: dict[str, FileSum] = {}
    with ThreadPoolExecutor(2) as pool:
        for path, sha256 in zip(paths, pool.map(hash_of, paths), strict=True):
            sums[path.name] = FileSum(stamps[path.name][0], sha256)
            done += stamps[path.name][0]
            report(Count(done >> 20, total >> 20, f"hash {path.name}"))
    write_json(output / SUMS, {name: [*stamps[name], found.sha256] for name, found in sums.items()})
    return Source(folder.name, _revision(folder), fingerprint_of({name: found.sha256 for name, found in sums.items()}), sums)


def check_unchanged(folder: Path, output: Path) -> None:
    """Raises UnusableInput when a file was touched since describe_source hashed it."""
    for name, (*stamp, _) in read_json(output / SUMS).items():
        if not (folder / name).is_file() or list(_stamp(folder / name)) != stamp:
            raise UnusableInput(f"{folder / name}: changed while it was being prepared; give the same command again")


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _revision(folder: Path) -> str:
    """Where huggingface_hub left word of it: beside the files, or as the folder's name in its cache."""
    metadata = folder / ".cache/huggingface/download/config.json.metadata"
    if metadata.is_file():
        return metadata.read_text().split("\n", 1)[0]
    resolved = folder.resolve()
    return resolved.name if resolved.parent.name == "snapshots" else "unknown"
