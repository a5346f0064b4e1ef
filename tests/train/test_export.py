"""`ernie export`: the files that the run itself writes at its end, from its last checkpoint."""

import sys
from pathlib import Path

import pytest

from train import sft
from train.config import ExportConfig, UserError
from train.export import export_checkpoint

SETTINGS = [
    "experiment=digits",
    "tracker=none",
    "run.steps=2",
    "run.save_every=1",
    "optim.warmup_steps=1",
    "data.max_tokens=128",
    "evaluate.every=0",
    "evaluate.max_examples=2",
    "evaluate.sheet=0",
    "parallel.cpu=true",
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("settings", "names"),
    [(["optim.freeze=[vision]"], ["export"]), (["peft=lora", "peft.merge=true"], ["adapter", "export"])],
    ids=["all weights", "adapters"],
)
def test_the_newest_checkpoint_gives_what_the_run_gave(tmp_path, monkeypatch, settings, names):
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["ernie sft", *SETTINGS, *settings, f"run.folder={run}"])
    sft.main()
    written = export_checkpoint(ExportConfig(checkpoint=str(run), output=str(tmp_path / "out")))
    assert sorted(folder.name for folder in written) == names
    for name in names:
        assert files(tmp_path / "out" / name) == files(run / name)
    # and a named one, of an earlier step
    first = run / "checkpoints" / "step-000001"
    export_checkpoint(ExportConfig(checkpoint=str(first), output=str(tmp_path / "first")))
    assert files(tmp_path / "first" / names[0]) != files(run / names[0])
    with pytest.raises(UserError, match="is not empty, and nothing is overwritten"):
        export_checkpoint(ExportConfig(checkpoint=str(run), output=str(tmp_path / "out")))
    (shard,) = first.glob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="step-000001 is damaged .*shard-00000.safetensors does not have the checksum"):
        export_checkpoint(ExportConfig(checkpoint=str(first), output=str(tmp_path / "third")))


def test_where_there_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no whole checkpoint. Name a run folder"):
        export_checkpoint(ExportConfig(checkpoint=str(tmp_path), output=str(tmp_path / "out")))
