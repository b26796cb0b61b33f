"""Where prompts come from. One module per kind of source, each an iterator of the prompts of one side of the split; what a
row of JSONL, Parquet or `datasets` may say is decided in one place (rows.py)."""
