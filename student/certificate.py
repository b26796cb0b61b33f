"""What training's certificate says, for whoever states it. No torch: a finished stage is recognised without loading anything."""

from typing import NamedTuple

from data.checksum import parse_checked
from data.store import RunFolder, sha256_file


class Certified(NamedTuple):
    """What metrics/certificate.json says of the recipe's gradients, and the file's sha256."""

    sha256: str
    holds: bool
    largest_difference: float
    bound: float


def read_certificate(run: RunFolder) -> Certified | None:
    """None where `tracestill train --certify` was not run. Raises UnusableInput when the file is not what was written."""
    path = run.metrics / "certificate.json"
    if not path.is_file():
        return None
    said = parse_checked(path, path.read_bytes())
    return Certified(sha256_file(path), said["holds"], said["largest_difference"], said["bound"])
