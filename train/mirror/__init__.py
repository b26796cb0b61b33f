"""W&B as a mirror of metrics/train.jsonl, which is the truth.

mirror.py      the training's side: starts the process, tells it of samples and the adapter, waits for it at the end
process.py     the process: follows the file, has every row in W&B once
spec.py        what the one tells the other
fragments.py   W&B's offline files, read and cut, so that put together they have every step once
redact.py      what may leave this machine
sync.py        python -m train.mirror.sync RUN_DIR: sends offline fragments
"""
