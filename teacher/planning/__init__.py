"""The arithmetic behind `teacher/plan.py`, a question a module, no torch anywhere.

architecture, attention_size, tensor_headers: what a config.json means in parameters and cached values. degrees: a layout's
numbers, resolved. placement, weights: bytes on one GPU. fit, layout_search: does it fit, and what would. throughput: rates
against the bound. workload: traces, hours, money. table: what is shown. GPUs and links: configs/devices.py.
"""
