"""What W&B is told not to send, in one place for every stage that mirrors its figures there. Imports no wandb."""

PRIVATE: dict[str, bool | str] = {
    "silent": True,
    "host": "",
    "username": "",
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
"""Keywords of wandb.Settings: no argument vector, host facts, package list, code, git state or console output leaves."""
