"""Logging, configured once at the edge: plain lines, the rank in front when there are several."""

import logging
import os
import warnings
from pathlib import Path

# Our own bars and lines say how far a stage is; the libraries' would only tear them. Read when those are imported.
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


def configure_logging(level: int = logging.INFO) -> None:
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank is not None else ""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not Path("/proc/driver/nvidia").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unset, DeepSpeed guesses and prints a warning about it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch\.distributed")
    logging.basicConfig(
        level=level, format=f"%(asctime)s {prefix}%(name)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in ("httpx", "httpcore", "filelock", "urllib3", "DeepSpeed", "datasets", "matplotlib", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
