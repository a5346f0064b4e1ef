"""`ernie dpo` as people use it: pairs with pictures from a file, a folder of weights at the end, and refusals."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ernie_model.checkpoint import load_model
from ernie_model.processor import Processor
from tests.end_to_end.test_sft import records
from tests.preferences import QUICK, files, write_preferences
from train import checkpoint, dpo, training

STEPS = ["run.steps=4", "run.save_every=2", "evaluate.every=2"]
LORA = ["peft=lora", "peft.rank=4", "peft.targets=[attention,text_experts]"]
KTO = "objective.preference_loss_type=kto"
LOG_2 = math.log(2)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("ERNIE_DEBUG", raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    write_preferences(folder := tmp_path_factory.mktemp("data"))
    return folder


def ernie_dpo(monkeypatch, data: Path, *settings: str) -> int:
    """The exit code of `ernie dpo SETTINGS`, in this process."""
    given = [f"model.checkpoint={data / 'model'}", *files(data), *QUICK, *STEPS]
    monkeypatch.setattr(sys, "argv", ["ernie dpo", *given, *settings])
    try:
        dpo.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def steps(folder: Path) -> list[dict]:
    """metrics.jsonl, less what the clock decides."""
    clock = {"time", "step_s", "data_wait", "eta_s", "memory_gb", "mfu"}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in one.items() if k not in clock and not k.endswith("_per_s")} for one in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_a_whole_run_on_pairs_with_pictures(tmp_path, monkeypatch, capfd, data):
    run = tmp_path / "run"
    assert ernie_dpo(monkeypatch, data, f"run.folder={run}", "data.accumulation=2") == 0
    said = capfd.readouterr().out
    assert "the reference is a second model" in said and "refused" not in said
    loss, evaluated = records(run, "loss"), records(run, "eval_loss")
    assert list(loss) == [1, 2, 3, 4] and list(evaluated) == [0, 2, 4]
    # before the first update every log-ratio is 0, to the last bit
    assert loss[1] == pytest.approx(LOG_2, rel=1e-7) == evaluated[0] and records(run, "reward_margin")[1] == 0
    assert loss[4] < loss[1] - 0.05 and records(run, "reward_accuracy")[4] > 0.5
    for key in ("reward_chosen", "reward_rejected", "logprob_chosen", "tokens_rejected", "kl_chosen", "loss_image"):
        assert list(records(run, key)) == [1, 2, 3, 4], key
    assert (run / "config.yaml").read_text().count("preference_loss_type: sigmoid") == 1
    assert [path.name for path in checkpoint.complete(run / "checkpoints")] == ["step-000002", "step-000004"]
    for name in ("best", "export"):
        assert load_model(run / name).config == Processor.from_pretrained(run / name).config
    before, after = load_file(data / "model" / "model.safetensors"), weights(run / "export")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name].to(value.dtype))}
    assert len(moved) > len(after) * 0.9
    # its result is what another run starts from
    on = [
        f"model.checkpoint={run / 'export'}",
        "run.steps=1",
        "evaluate.every=0",
        *LORA,
        f"run.folder={tmp_path / 'on'}",
    ]
    assert ernie_dpo(monkeypatch, data, *on) == 0
    assert records(tmp_path / "on", "loss")[1] == pytest.approx(LOG_2, rel=1e-7)
    assert (tmp_path / "on" / "adapter").is_dir()


def test_in_bfloat16_the_first_loss_is_log_2_and_recomputed_activations_change_no_bit(tmp_path, monkeypatch, data):
    given = [*LORA, "model.precision=bf16", "data.accumulation=2", "run.steps=3", "evaluate.every=0"]
    given += ["objective.mdpo_conditional=1", "objective.added_losses={bco_pair: 0.5}"]
    found = {}
    for recompute in ("none", "layers_and_vision"):
        run = tmp_path / recompute
        assert ernie_dpo(monkeypatch, data, *given, f"model.recompute={recompute}", f"run.folder={run}") == 0
        # a pair counts once, half for bco; what was not corrupted has no conditional loss
        assert records(run, "loss_sigmoid")[1] == pytest.approx(LOG_2, rel=1e-7)
        assert records(run, "loss_bco_pair")[1] == pytest.approx(0.5 * 2 * LOG_2, rel=1e-7)
        assert records(run, "loss_sigmoid")[3] != pytest.approx(LOG_2, rel=1e-3)
        found[recompute] = steps(run), weights(run / "adapter")
    (metrics, trained), (its_metrics, its_trained) = found.values()
    drop = ("flops",)
    assert [{k: v for k, v in one.items() if k not in drop} for one in metrics] == [
        {k: v for k, v in one.items() if k not in drop} for one in its_metrics
    ]
    assert all(torch.equal(value, its_trained[name]) for name, value in trained.items())


def test_a_stop_before_an_evaluation_leaves_its_numbers_as_they_are(tmp_path, monkeypatch, data):
    """The divergence that answers are measured against is of the update before; the start that goes on must know it."""
    given = ["objective.preference_loss_type=kto_pair", "data.accumulation=2"]
    assert ernie_dpo(monkeypatch, data, *given, f"run.folder={tmp_path / 'whole'}") == 0

    class Stop(training.StopSignal):
        asked = 0

        def __call__(self) -> bool:
            self.asked += 1
            return self.asked == 2  # after the second update, whose evaluation is due

    broken = f"run.folder={tmp_path / 'broken'}"
    with monkeypatch.context() as patch:
        patch.setattr(training, "StopSignal", Stop)
        assert ernie_dpo(monkeypatch, data, *given, broken) == 0
    assert list(records(tmp_path / "broken", "eval_loss")) == [0]
    assert ernie_dpo(monkeypatch, data, *given, broken) == 0
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["reference.kind=adapters_off"], "reference.kind=adapters_off needs an adapter to turn off: peft=lora."),
        (["reference.kind=none"], "reference.kind is none, but the loss compares with a reference."),
        (
            [*LORA, "reference.update=ema", "reference.every=1", "reference.mix=0.1"],
            "reference.update=ema averages weights",
        ),
        (["reference.kind=cached"], "reference.kind"),
        (["reference.checkpoint=nowhere"], "nowhere"),
        (["parallel.expert=2"], "parallel.expert is 2, which does not divide the 1 processes"),
        ([KTO], "label"),
        (["data.max_tokens=24"], "more than a row holds"),
        (["objective.bata=1"], "did you mean objective.beta?"),
    ],
)
def test_mistakes_are_told_before_the_first_step(tmp_path, monkeypatch, capfd, data, settings, message):
    assert ernie_dpo(monkeypatch, data, f"run.folder={tmp_path / 'run'}", *settings) == 1
    said = capfd.readouterr()
    assert said.err.startswith("error: ") and message in said.err and "Traceback" not in said.err
    assert "step 1/" not in said.out
