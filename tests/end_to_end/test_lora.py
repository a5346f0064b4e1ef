"""`ernie sft peft=lora` as people use it: train, resume, merge afterwards, go on from the adapter."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_model.checkpoint import load_model
from tests.end_to_end.test_sft import QUICK, records
from train import checkpoint, sft
from train.lora.files import CONFIG, WEIGHTS

LORA = ["peft=lora", "peft.rank=4", "peft.targets=[attention,text_experts,vision_experts]"]
RANKS = "peft.ranks.vision_experts=2"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ERNIE_DEBUG", raising=False)


def ernie_sft(monkeypatch, *settings: str) -> int:
    """The exit code of `ernie sft SETTINGS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["ernie sft", *QUICK, *LORA, *settings])
    try:
        sft.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_a_run_with_adapters_resumes_bit_for_bit_and_merges_afterwards(tmp_path, monkeypatch, capfd):
    one, two = tmp_path / "one", tmp_path / "two"
    assert ernie_sft(monkeypatch, f"run.folder={one}", RANKS) == 0
    said = capfd.readouterr().out
    assert "vision_experts │ 3       │ 2" in said and f"weights   {one / 'adapter'}" in said.replace("\n", "")
    assert sorted(p.name for p in (one / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    assert (one / "best_adapter").is_dir() and not (one / "export").exists() and not (one / "best").exists()
    weights = [path / checkpoint.shard_name(0) for path in checkpoint.complete(one / "checkpoints")]
    assert max(path.stat().st_size for path in weights) < 1_500_000  # the model itself has 42 MB

    # as if it had been killed after step 4
    shutil.copytree(one, two)
    shutil.rmtree(two / "checkpoints" / "step-000006")
    shutil.rmtree(two / "adapter")
    assert ernie_sft(monkeypatch, f"run.folder={two}", RANKS) == 0
    assert records(two, "loss") == records(one, "loss")
    assert (two / "adapter" / WEIGHTS).read_bytes() == (one / "adapter" / WEIGHTS).read_bytes()
    assert (two / "adapter" / CONFIG).read_bytes() == (one / "adapter" / CONFIG).read_bytes()

    # a finished run merges when it is asked to, and its weights are a base to go on from
    assert ernie_sft(monkeypatch, f"run.folder={two}", RANKS, "peft.merge=true") == 0
    assert load_model(two / "export").config.num_hidden_layers == 4
    goes_on = [RANKS, f"peft.init_from={one / 'adapter'}", "run.steps=3", "optim.warmup_steps=0", "evaluate.sheet=0"]
    assert ernie_sft(monkeypatch, f"run.folder={tmp_path / 'three'}", *goes_on) == 0
    before, after = records(one, "eval_nll"), records(tmp_path / "three", "eval_nll")
    assert after[0] == before[6]  # starts where the other ended
    moved = load_file(tmp_path / "three" / "adapter" / WEIGHTS)
    assert any(not torch.equal(value, moved[name]) for name, value in load_file(one / "adapter" / WEIGHTS).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["peft.targets=[atention]"], "peft.targets names atention; parts that can have adapters: attention, dense,"),
        (["peft.rank=0"], "peft.rank is 0; it must be at least 1."),
        (["peft.ranks.router=4"], "peft.ranks names router; parts that can have adapters"),
        (
            ["peft.targets=[vision]", "optim.freeze=[vision]"],
            "optim.freeze has vision, but an adapter",
        ),
        (["peft.init_from=nowhere"], "peft.init_from=nowhere cannot be read as an adapter"),
        (["peft.dora=true"], "peft.dora=True cannot be used on text_experts, vision_experts"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, monkeypatch, capfd, settings, message):
    assert ernie_sft(monkeypatch, f"run.folder={tmp_path / 'run'}", *settings) == 1
    assert message in capfd.readouterr().err


def test_a_changed_base_is_noticed_on_resume(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    assert ernie_sft(monkeypatch, f"run.folder={tmp_path / 'base'}", "run.steps=3", "peft.merge=true") == 0
    base = [f"model.checkpoint={tmp_path / 'base' / 'export'}", "run.steps=4", "optim.warmup_steps=1"]
    assert ernie_sft(monkeypatch, f"run.folder={folder}", *base) == 0
    path = tmp_path / "base" / "export" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    capfd.readouterr()
    assert ernie_sft(monkeypatch, f"run.folder={folder}", *base) == 1
    assert "the frozen weights under this adapter are not those it was trained on" in capfd.readouterr().err
