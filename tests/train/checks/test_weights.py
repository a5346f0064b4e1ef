"""Headers and tokenizer of real folders, whole and broken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_model.checkpoint import SINGLE_FILE, CheckpointError, save_model
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer, tiny_tokenizer_ids
from tests.train import small
from train.checks.findings import Level
from train.checks.weights import check_weights
from train.config import ModelConfig


@pytest.fixture
def folder(tmp_path):
    config = small.CONFIG.replace(**tiny_tokenizer_ids())
    save_model(ErnieModel(config), tmp_path / "model", dtype=torch.bfloat16)
    Processor(load_tiny_tokenizer(), config).save(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_checkpoint_is_read_by_its_headers(folder, monkeypatch):
    monkeypatch.setattr("ernie_model.checkpoint.ErnieModel.to_empty", None)  # nothing is allocated
    found = check_weights(ModelConfig(checkpoint=str(folder)))
    assert found.architecture is not None and found.processor is not None
    assert [one.level for one in found.findings] == [Level.OK] * 3
    assert "all there" in found.findings[0].text and "bfloat16" in found.findings[0].text
    stored = load_file(folder / SINGLE_FILE)
    assert found.findings[0].text.startswith(f"{len(stored)} tensors in 1 file ")


def test_a_missing_and_a_misshapen_tensor_are_named(folder):
    stored = load_file(folder / SINGLE_FILE)
    del stored["model.norm.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[name] = stored[name].T.contiguous()
    save_file(stored, folder / SINGLE_FILE)
    stored[name] = stored[name][:, 1:].contiguous()
    save_file(stored, folder / SINGLE_FILE)
    with pytest.raises(CheckpointError) as caught:
        check_weights(ModelConfig(checkpoint=str(folder)))
    assert "model.norm.weight" in str(caught.value) and f"wrong shape: {name}" in str(caught.value)


def test_a_tokenizer_of_another_model_is_noticed(folder):
    config = json.loads((folder / "config.json").read_text())
    ids = config.get("text_config", config)
    assert ids["vocab_size"] == 2048
    stored = load_file(folder / SINGLE_FILE)
    wide = 4096
    ids["vocab_size"] = wide
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in stored:
            stored[name] = torch.zeros(wide, stored[name].shape[1], dtype=stored[name].dtype)
    save_file(stored, folder / SINGLE_FILE)
    levels = [one.level for one in check_weights(ModelConfig(checkpoint=str(folder))).findings]
    assert levels.count(Level.WARNING) == 1


def test_a_name_on_the_hub_is_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = check_weights(ModelConfig(checkpoint="baidu/ERNIE-4.5-nothing"))
    assert found.processor is None and [one.level for one in found.findings] == [Level.PROBLEM]
    assert "hf download baidu/ERNIE-4.5-nothing" in found.findings[0].text
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    found = check_weights(ModelConfig(checkpoint="baidu/ERNIE-4.5-nothing"))
    assert [one.level for one in found.findings] == [Level.WARNING] and "would download it" in found.findings[0].text
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    found = check_weights(ModelConfig(checkpoint="baidu/ERNIE-4.5-nothing"))
    assert [one.level for one in found.findings] == [Level.PROBLEM] and "no route" in found.findings[0].text
