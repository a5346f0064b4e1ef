"""Every layout publishes the files that one process publishes, to the last bit."""

from pathlib import Path

import pytest

from tests.distributed.exported import CASES, STATE_OF, in_many_files, write
from tests.distributed.test_ranks import launch
from tests.parity.reference import MODELS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    patch = in_many_files()
    for state in sorted(set(STATE_OF.values())):
        write(folder, state)
    patch.undo()
    launch(2, "-m", "tests.distributed.exported", str(folder))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("what", "layout"), CASES, ids=[" of ".join(case) for case in CASES])
def test_a_layout_publishes_what_one_process_publishes(folder, what, layout):
    one, mine = folder / STATE_OF[what], folder / what / layout
    for published in ("export", "adapter") if what == "adapters" else ("export",):
        assert files(mine / published) == files(one / published)
    assert len(files(mine / "export")) > 5
    assert {path.name for path in mine.iterdir()} <= {"export", "adapter"}  # nothing is left of how it was made


@pytest.mark.parametrize("layout", ["ep2 x2", "zero3 x2"])
def test_what_one_rank_misses_is_published_by_none(folder, layout):
    told = (folder / "lost" / f"{layout}.txt").read_text().splitlines()
    assert len(told) == 2 and told[0] == told[1]
    assert "vision_moe.experts.lora_A.weight differs from the live tensor" in told[0]
    assert not (folder / "lost" / layout).exists() or not list((folder / "lost" / layout).iterdir())


def test_transformers_loads_it(folder):
    _, model_class, _ = MODELS["ernie4_5_vl_moe"]
    _, info = model_class.from_pretrained(folder / "all" / "ep2 zero3 x2" / "export", output_loading_info=True)
    assert not any(info.values()), info
