"""`python -m train.mirror.sync RUN_DIR`: W&B's own `wandb sync` of a run's offline fragments, where and how it has to be called.

It must run in the folder of the metrics: artifacts name their files relative to it, and from elsewhere wandb 0.31 commits an
artifact without its files and exits 0. It must see little of this machine: it sends the path of its own program.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from configs.errors import UnusableInput
from train.mirror.fragments import fragments_of, mend
from train.mirror.mirror import process_environment
from train.mirror.spec import ID_FILE, run_id

SYNC_TIMEOUT_S = 3600.0


def sync(run_dir: Path) -> int:
    """The server has every step of the run once, and its artifacts; returns how many fragments were sent now. Not for a run
    that is training: what it is just writing would be cut.

    Raises:
        UnusableInput: the run has nothing of W&B's, or W&B did not take it.
    """
    metrics = run_dir / "metrics"
    if not (metrics / ID_FILE).is_file():
        raise UnusableInput(f"{metrics}: no {ID_FILE}; expected a run trained with train.wandb offline")
    unsent = [path.parent for path, is_sent in fragments_of(metrics, run_id(metrics)) if not is_sent and mend(path)]
    if not unsent:
        return 0
    print(f"{len(unsent)} to send; a server that does not answer is tried for a quarter of an hour", file=sys.stderr, flush=True)
    command = [sys.executable, "-P", "-m", "wandb", "sync", "--yes", *(str(path.relative_to(metrics)) for path in unsent)]
    environment = process_environment(metrics, "online")
    try:
        result = subprocess.run(command, cwd=metrics, env=environment, capture_output=True, text=True, timeout=SYNC_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise UnusableInput(
            f"{metrics}: W&B did not take it all within {SYNC_TIMEOUT_S:g} s; see to WANDB_BASE_URL and the way there, and repeat"
        ) from error
    still = [path.name for path in unsent if not list(path.glob("*.synced"))]
    if result.returncode or still:
        said = " ".join(result.stderr.split())[-300:]
        raise UnusableInput(
            f"{metrics}: W&B did not take {still or 'all'} ({said}); set WANDB_API_KEY and WANDB_BASE_URL, and repeat"
        )
    return len(unsent)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.mirror.sync", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    run_dir = parser.parse_args().run_dir
    try:
        print(f"{sync(run_dir)} fragments sent")
    except UnusableInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(UnusableInput.exit_code)


if __name__ == "__main__":
    main()
