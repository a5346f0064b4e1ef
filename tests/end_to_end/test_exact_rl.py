"""With rollout.exact, engine and trainer agree to the last bit in every update of a run, and IcePop masks nothing."""

import json
import sys

import pytest

from tests.rollouts import QUICK, files, write_prompts
from train import rl


def mismatches(folder, monkeypatch, *settings: str) -> list[dict[str, float]]:
    write_prompts(data := folder / "data")
    own = ["run.steps=3", "rollout.updates=1", "rollout.max_lag=0", f"run.folder={folder / 'run'}", *settings]
    monkeypatch.setattr(sys, "argv", ["ernie rl", *files(data), *QUICK, "optim.lr=3e-5", *own])
    rl.main()
    logged = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in logged if "mismatch_max" in line]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_token_differs(tmp_path, monkeypatch, precision):
    exact = ("rollout.exact=true", f"model.precision={precision}", "sampling.temperature=0.9")
    found = mismatches(tmp_path, monkeypatch, *exact)
    assert len(found) == 3
    for line in found:
        assert line["mismatch_max"] == line["mismatch_masked"] == line["mismatch_unknown"] == 0.0
        assert line["mismatch_max_image"] == 0.0 and line["mismatch_max_text"] == 0.0


def test_without_it_they_do(tmp_path, monkeypatch):
    found = mismatches(tmp_path, monkeypatch, "model.precision=bf16")
    assert max(line["mismatch_max"] for line in found) > 1e-4
