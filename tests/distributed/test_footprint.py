"""What a rank is said to hold at the highest point of a step, against what torch allocates on one of two gloo ranks."""

import pytest

from tests.bench.plan import LAYOUTS, Case, compare

SHARED_OUT = [name for name in LAYOUTS if name != "one process"]


def check(cases: list[Case]) -> None:
    for case, (measured, said) in compare(cases).items():
        assert said == pytest.approx(measured, rel=0.1), case


def test_two_ranks_hold_what_is_said():
    check([Case("small", "zero=1", tokens=640), Case("small", "expert=2 zero=2", tokens=640)])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_every_layout(recompute, accumulation):
    check([Case("small", layout, recompute=recompute, accumulation=accumulation) for layout in SHARED_OUT])
