"""docs/inference.md: its Python runs as it stands, and its table says what the settings are."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from ernie_model.checkpoint import save_model
from ernie_model.config import ErnieConfig
from ernie_model.inference.engine import EngineSettings
from ernie_model.inference.runner import Runner
from ernie_model.model import ErnieModel

PAGE = Path(__file__).resolve().parents[3] / "docs" / "inference.md"
ENGINE = PAGE.read_text(encoding="utf-8").split("\n## The engine\n")[1].split("\n## ")[0]


def test_the_python_of_the_page_runs(processor, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "digits" / "export"
    save_model(ErnieModel(processor.config), folder)
    processor.save(folder)
    Image.new("RGB", (64, 64), "white").save(tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", ENGINE, re.S)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.count("Finish.") == 4


def test_the_table_names_every_setting_with_its_value():
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+?) \|", ENGINE, re.M))
    fields = {field.name: field.default for field in dataclasses.fields(EngineSettings)}
    assert rows.keys() == fields.keys()
    for name, value in rows.items():
        if name not in ("max_context", "threads"):
            assert value == str(fields[name]).lower()


def test_the_size_of_a_token_is_what_the_page_says():
    config = ErnieConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=28, num_attention_heads=20, num_key_value_heads=4, head_dim=128,
        intermediate_size=8,
    )  # fmt: skip
    page_bytes = Runner.page_bytes(config, torch.bfloat16, 16)
    ((kib, tokens),) = re.findall(r"takes (\d+) KiB of cache in bfloat16, so 1 GiB holds ([\d,]+) tokens", ENGINE)
    assert page_bytes == pytest.approx(int(kib) * 1024 * 16)
    assert 2**30 // page_bytes * 16 == int(tokens.replace(",", ""))
