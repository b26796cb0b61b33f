"""A cluster for each file of tests, empty before each of them."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, running, wait_for


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test that failed has left behind is not the next one's trouble."""
    yield
    if "cluster" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("cluster")
        if cluster.call("squeue", "-h"):
            cluster.call("scancel", "--user=root")
            wait_for(lambda: not cluster.call("squeue", "-h"), "an empty queue", 60)
        cluster.resume_nodes()
