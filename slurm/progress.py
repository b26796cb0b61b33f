"""What a stage has committed so far, as a few words that differ when there is more of it. A job that is interrupted twice between
the same words would be so for ever."""

import contextlib
from pathlib import Path

import yaml

from data.ledger import read_fates
from data.store import RunFolder, segments
from data.work import WorkFolder
from slurm.attempts import JobFolder, lines


def progress_of(run: RunFolder, stage: str) -> str:
    """Counts of what stays when the stage is killed now. Stages that commit nothing before their end have none."""
    match stage:
        case "generate" | "canary":
            fates = read_fates(run)
            return _said(traces=sum(fates.by_reason.values()), journal_bytes=_bytes(WorkFolder.of(run).journal))
        case "headroom" | "evaluate":
            asked, scored = (
                sum(part.rows for folder in sorted(run.evaluation.glob(f"*.{kind}")) for part in segments(folder))
                for kind in ("items", "scores")
            )
            return _said(items=asked, **({"likelihoods": scored} if scored else {}))
        case "data":
            return _said(verdict_bytes=_bytes(run.verdicts))
        case "train":
            return _said(step=_newest_step(run))
        case "serve":
            return _said(servers=sum(1 for _ in lines(JobFolder.of(run).served)))
        case "prepare":
            return _said(files=_prepared_files(run))
        case "export":
            return _said(formats=len(list(run.export.glob("[!.]*/provenance.json"))))
        case _:
            return ""


def _said(**counts: int) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _prepared_files(run: RunFolder) -> int:
    """Of the shards that the run's recipe names, as seen from where its jobs run; a file has its name when it is whole."""
    try:
        engine = yaml.safe_load(run.config.read_text())["recipe"]["teacher"]["engine"]
        return sum(path.is_file() and not path.name.startswith(".") for path in Path(engine["prepared"]).rglob("*"))
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return 0


def _newest_step(run: RunFolder) -> int:
    names = (path.name.removeprefix("step-") for path in run.checkpoints.glob("step-*") if path.is_dir())
    return max((int(name) for name in names if name.isdigit()), default=0)
