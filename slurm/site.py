"""The values of a cluster under those of a recipe: a recipe goes from site to site, a partition's name does not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.cluster import Slurm
from configs.errors import UnusableInput
from configs.load import describe


def settle_site(settings: Slurm, folders: Sequence[Path]) -> Slurm:
    """The section with its site's YAML under it: the recipe's own values (and those of -s) count before the site's, stage by
    stage. folders: where a relative path is looked up, in order.

    Raises:
        UnusableInput: there is no such file, or it is no YAML of this section.
    """
    if not settings.site:
        return settings
    places = [folder / settings.site for folder in folders]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = ", ".join(str(place) for place in places)
        raise UnusableInput(
            f"slurm.site {settings.site}: no such file (looked at {looked}); expected a YAML of the slurm section"
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UnusableInput(f"slurm.site {path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or "site" in values:
        raise UnusableInput(f"slurm.site {path}: expected the keys of the slurm section, such as partition, without site")
    own = settings.model_dump(exclude_unset=True)
    try:
        Slurm.model_validate(values)
        return Slurm.model_validate(_over(values, own) | {"site": ""})
    except ValidationError as error:
        raise UnusableInput(f"slurm.site {path}: {describe(error, Slurm)}") from error


def _over(site: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `site`, mappings key by key."""
    merged = dict(site)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
