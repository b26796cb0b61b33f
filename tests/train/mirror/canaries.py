"""A training in little that mirrors to W&B from a place full of secrets: `python -m tests.train.mirror.canaries FOLDER MODE`.

Each secret carries a word of its own, CANARY and a number, where its format leaves room for one.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from train.mirror.mirror import Lineage, Sample, open_mirror
from train.tracking import METRICS_FILE, MetricsFile

ENVIRONMENT = {
    "OPENAI_API_KEY": "sk-CANARY01aaaaaaaaaaaaaaaa",
    "AWS_SECRET_ACCESS_KEY": "CANARY02/abc+def",
    "HF_TOKEN": "hf_CANARY03aaaaaaaaaaaa",
    "DATABASE_URL": "postgresql://app:CANARY04@db/x",
    "SLURM_JOB_COMMENT": "CANARY05",
    "PIP_INDEX_URL": "https://u:CANARY06@packages.example.org/simple",
    "USER": "canary07",
    "LOGNAME": "canary07",
    "WANDB_NOTES": "CANARY08",
    "WANDB_TAGS": "CANARY09",
    "GIT_AUTHOR_EMAIL": "canary10@example.org",
}
ARGUMENT = "--password=CANARY11"
WORKING_FOLDER = "canary12-project"
DOT_ENV = "DB_PASSWORD=CANARY13\n"
NETRC = "machine 127.0.0.1 login canary14 password CANARY14aaaaaaaa\n"
REMOTE = "https://x-access-token:CANARY15@github.example.org/a/b.git"
PRINTED, LOGGED, RAISED = "CANARY16 on standard output", "CANARY17 on standard error", "CANARY18 in an exception"
HOST_NAME = "canary19-node"
CONFIG = {
    "teacher.api_key": "CANARY20",
    "teacher.url": "https://robot:CANARY21@models.example.org/v1",
    "student.model": "/home/canary22/weights/base",
    "data.headers": ["Authorization: Bearer CANARY23aaaaaaaa"],
}
PROMPTS = (
    "My key is sk-ant-api03-CANARY24aaaaaaaaaaaaaaaa, keep it.",
    "git clone https://ghp_CANARY25aaaaaaaaaaaa@github.example.org/a.git",
    "-----BEGIN RSA PRIVATE KEY-----\nCANARY26aaaa\n-----END RSA PRIVATE KEY-----",
    "write to canary27@example.org",
    "Traceback: File \"/home/canary28/src/a.py\", line 3, in <module>",
    "curl -H 'Authorization: Basic CANARY29aaaaaaaa' http://x",
    "password: CANARY30aaaa",
    "token eyJCANARY31aaaa.eyJCANARY31bbbb.cccc",
    "the server at 203.0.113.77",
)  # fmt: skip
ADAPTER_CONFIG = {"base_model_name_or_path": "/home/canary32/weights", "r": 4}
NEEDLES = [*(f"canary{number:02d}" for number in range(1, 33)), "203.0.113.77"]
STEPS = 3


def furnish(folder: Path) -> Path:
    """The working folder of the training, with its neighbours; returns it."""
    project = folder / WORKING_FOLDER
    adapter = project / "run" / "checkpoints" / "adapter"
    adapter.mkdir(parents=True)
    (project / "run" / "metrics").mkdir()
    (project / ".env").write_text(DOT_ENV)
    for place in (project, folder):
        (place / ".netrc").write_text(NETRC)
        (place / ".netrc").chmod(0o600)
    for command in (["init", "-q"], ["remote", "add", "origin", REMOTE]):
        subprocess.run(["git", *command], cwd=project, check=True)
    (adapter / "adapter_model.safetensors").write_bytes(bytes(64))
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    return project


def main(mode: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    run = Path("run")
    file = MetricsFile(run / "metrics" / METRICS_FILE, resume_step=0)
    lineage = Lineage("d" * 64, "b" * 64, "f" * 16, "0123456789" * 4, dataset_files={"dataset/train.arrow": "e" * 64})
    mirror = open_mirror(
        run / "metrics", mode="online" if mode == "online" else "offline", project="canaries", name="tiny", config=CONFIG,
        lineage=lineage, resume_step=0, timeout_s=300.0,
    )  # fmt: skip
    assert mirror is not None
    mirror.log_samples([Sample("trace", "task", prompt, prompt, f"{PRINTED.split()[1]} {prompt}", 7) for prompt in PROMPTS])
    print(PRINTED, flush=True)
    logging.getLogger(__name__).error(LOGGED)
    for step in range(1, STEPS + 1):
        file.log(step, {"loss/nats_per_token": 1.0 / step})
        try:
            raise ValueError(RAISED)
        except ValueError:
            logging.getLogger(__name__).exception("a step failed")
    mirror.log_adapter(run / "checkpoints" / "adapter")
    mirror.close()


def command(mode: str) -> list[str]:
    """Under another host name where this user may give one."""
    program = [sys.executable, "-m", "tests.train.mirror.canaries", mode, ARGUMENT]
    named = ["unshare", "--uts", "sh", "-c", f'hostname {HOST_NAME} && exec "$@"', "sh"]
    may = os.geteuid() == 0 and subprocess.run([*named, "true"], capture_output=True).returncode == 0
    return [*named, *program] if may else program


if __name__ == "__main__":
    main(sys.argv[1])
