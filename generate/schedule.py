"""Identity of a run's sampling."""

from configs.schema import Sampling
from data.records import digest


def sampling_fingerprint(sampling: Sampling, seed: int) -> str:
    return digest(sampling.model_dump(mode="json"), seed)
