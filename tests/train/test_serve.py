"""`ernie serve`: its settings, and the program itself with a tiny model."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
import torch

from ernie_model.checkpoint import save_model
from tests import programs
from tests.load.serving import tiny_model
from train import serve
from train.config import UserError
from train.inference_config import AgentConfig, ServeConfig


def config(**settings) -> ServeConfig:
    return ServeConfig(checkpoint="x", **settings)


def test_keys_come_from_the_setting_the_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("ERNIE_API_KEY", raising=False)
    assert serve.read_keys(config()) == ()
    (tmp_path / "keys").write_text("one\n\n two \none\n")
    monkeypatch.setenv("ERNIE_API_KEY", "three")
    assert serve.read_keys(config(api_key="four", api_key_file=str(tmp_path / "keys"))) == (
        "four",
        "three",
        "one",
        "two",
    )
    (tmp_path / "empty").write_text("\n")
    for file, message in (("empty", "holds no key"), ("missing", "cannot be read")):
        with pytest.raises(UserError, match=message):
            serve.read_keys(config(api_key_file=str(tmp_path / file)))
    with pytest.raises(UserError, match="a letter that a header cannot carry"):
        serve.read_keys(config(api_key="schlüssel"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(port=65536), "port is 65536; it must lie in 0..65535."),
        (lambda: config(grace_s=float("inf")), "grace_s is inf"),
        (lambda: config(api_key=""), "api_key is empty"),
        (lambda: serve.media_door(config(media_root="/no/such/folder")), "media_root=/no/such/folder is not a folder."),
        (lambda: serve.check_index(AgentConfig(index="i")), "agent.index=i is for image_search, which is not among"),
        (
            lambda: serve.listen(config(host="203.0.113.1")),
            "host=203.0.113.1 port=8000: .* Name an address",
        ),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_name_of_the_model(tmp_path):
    for name in ("signs/export", "signs/best", "plain"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "signs" / "run.json").write_text("{}")
    assert serve.model_name(str(tmp_path / "signs")) == serve.model_name(str(tmp_path / "signs" / "best")) == "signs"
    assert serve.model_name(str(tmp_path / "plain")) == "plain"
    assert serve.model_name("baidu/ERNIE-4.5-VL-28B-A3B-PT") == "baidu/ERNIE-4.5-VL-28B-A3B-PT"


def test_the_program_from_its_start_to_sigterm(tmp_path):
    """The line it prints can be typed: it is a request with its answer. SIGTERM ends it with exit code 0."""
    model, processor = tiny_model()
    save_model(model.set_dtype(torch.float32), tmp_path / "tiny")
    processor.save(tmp_path / "tiny")
    command = [
        "serve",
        f"checkpoint={tmp_path / 'tiny'}",
        "port=0",
        "precision=fp32",
        "cpu=true",
        "engine.cache_gib=0.01",
        "agent.tools=[image_zoom_in_tool]",
    ]
    environment = os.environ | {"ERNIE_API_KEY": "a-key"}
    program = subprocess.Popen(
        [sys.executable, "-m", "train.cli", *command, "sampling.max_new_tokens=3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        assert program.stdout is not None
        url = program.stdout.readline().removeprefix("serving: tiny at ").strip()
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1"), program.communicate(timeout=30)
        assert program.stdout.readline() == "tools:   image_zoom_in_tool\n"
        tried = program.stdout.readline()
        assert tried.startswith(f"try:     curl {url}/chat/completions -H 'authorization: Bearer KEY'")
        body = tried.split(" -d '")[1].rstrip("'\n")
        headers = {"content-type": "application/json", "authorization": "Bearer a-key"}
        request = urllib.request.Request(f"{url}/chat/completions", body.encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            said = json.load(answer)
        assert said["usage"]["completion_tokens"] == 3 and said["choices"][0]["status"] == "truncated"
        program.send_signal(signal.SIGTERM)
        rest, _ = program.communicate(timeout=30)
        assert program.returncode == 0 and rest == ""
    finally:
        program.kill()
        program.wait()


def test_a_port_that_is_taken_is_told_before_the_weights_are_read():
    listener = serve.listen(config(port=0))
    listener.listen()
    port = listener.getsockname()[1]
    done = programs.run(["-m", "train.cli", "serve", "checkpoint=/no/such", f"port={port}"], timeout=60)
    listener.close()
    assert done.returncode == 1
    assert done.stderr == (
        f"error: host=127.0.0.1 port={port}: Address already in use. Choose another port (0: a free one).\n"
    )
