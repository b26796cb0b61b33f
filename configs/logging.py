"""Logging, configured once at the edge: plain lines, the rank in front when there are several."""

import logging
import os


def configure_logging(level: int = logging.INFO) -> None:
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank is not None else ""
    logging.basicConfig(
        level=level, format=f"%(asctime)s {prefix}%(name)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in ("httpx", "httpcore", "filelock", "urllib3", "DeepSpeed", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
