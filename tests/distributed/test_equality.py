"""Every layout computes what one process computes: a covering part of the table that equality.py prints."""

import json

import pytest

from tests.distributed.equality import COVERING, LIMITS, table
from tests.distributed.gloo import launch


@pytest.fixture(scope="module", params=COVERING)
def distances(request, tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("equality") / "out.json"
    cases = COVERING[request.param]
    launch(request.param, "-m", "tests.distributed.equality", str(out), *map(str, cases), limit_s=280)
    found = json.loads(out.read_text())
    assert list(found) == [str(case) for case in cases]
    return found


def test_layouts_equal_one_process(distances):
    for case, distance in distances.items():
        for key, limit in LIMITS.items():
            assert distance[key] <= limit, (case, key, distance)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_the_whole_table():
    assert not table()
