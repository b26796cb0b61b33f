"""The arithmetic behind `student/plan.py`, a question a module, no torch anywhere.

shape: what a config.json means in layers and parameters. adapter: what LoRA trains of them. sharding: bytes of weights,
gradients and optimizer on one rank under each ZeRO stage. activations: what a packed row keeps for the backward pass. memory:
all of it on one GPU. rate: tokens a second, hours, money. nearest: settings that fit when these do not. table: what is shown.
"""
