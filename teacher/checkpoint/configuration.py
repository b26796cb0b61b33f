"""What the config.json of a checkpoint says, before anything is made of it; whatever is wrong with it is one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from configs.errors import UnusableInput
from teacher.checkpoint.files import DEFAULT_BLOCK
from teacher.folders import read_config_json
from teacher.runner import MESSAGE_CHARACTERS, read_config


class Configuration(NamedTuple):
    """model: as transformers reads it. block: rows and columns of a weight that share a scale, where it is FP8."""

    model: PretrainedConfig
    block: tuple[int, int]


def read_configuration(folder: Path) -> Configuration:
    """Raises UnusableInput when config.json is no JSON object, or says something that cannot be a model."""
    with usable(folder):
        said = read_config_json(folder)
        block = _block(folder / "config.json", said.get("quantization_config"))
        return Configuration(read_config(folder), block)


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """What transformers raises inside is about the folder's config.json, and is said so in one line. Any kind of error: values
    of a wrong kind came as OSError, AttributeError, KeyError, RuntimeError, AssertionError, ZeroDivisionError and two kinds of
    its own, some of them only when the model is built."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings: our error follows, or the engine that loads the model repeats them
    try:
        yield
    except UnusableInput:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        if len(message) > MESSAGE_CHARACTERS:
            message = f"{message[:MESSAGE_CHARACTERS]} ..."
        raise UnusableInput(
            f"{folder / 'config.json'}: not usable: {type(error).__name__}: {message}; restore the checkpoint's own config.json"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _block(path: Path, quantisation: object) -> tuple[int, int]:
    """Of quantization_config; the default where it says nothing."""
    if quantisation is None:
        return DEFAULT_BLOCK
    if not isinstance(quantisation, dict):
        raise UnusableInput(
            f"{path}: quantization_config is {quantisation!r}, expected an object; restore the checkpoint's own config.json"
        )
    found = quantisation.get("weight_block_size")
    if found is None:
        return DEFAULT_BLOCK
    if not (isinstance(found, list) and len(found) == 2 and all(type(side) is int and side > 0 for side in found)):
        raise UnusableInput(
            f"{path}: quantization_config.weight_block_size is {found!r}, expected two whole numbers above 0, such as "
            f"{list(DEFAULT_BLOCK)}; restore the checkpoint's own config.json"
        )
    return found[0], found[1]
