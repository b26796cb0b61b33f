"""Workers killed at random moments on one run folder; tests/bench/kill_storm.py has the whole storm of 200."""

from pathlib import Path

import pytest

from tests.bench.kill_storm import storm_on_http


@pytest.mark.long
@pytest.mark.smoke
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_seen_twice_and_little_is_said_twice(tmp_path: Path) -> None:
    found = storm_on_http(tmp_path, kills=16, requests=300, seed=7)
    assert (found.lost, found.duplicated, found.wrong) == (0, 0, 0), found
    assert found.redone <= found.redone_bound, found
