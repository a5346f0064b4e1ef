"""Real vLLM on the CPU computes what we compute, from a folder that `ernie export layout=vllm` wrote; and still needs
our plugin for it: without each of the fixes the answer is another one.

`make test-vllm` builds vLLM's own virtual environment and runs this; VLLM_PYTHON is the Python in it.
"""

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import openai
import pytest
import torch

from ernie_model.atomic import atomic_folder
from ernie_model.checkpoint import load_model, write_model
from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.context import Packed
from ernie_model.images import image_patches
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.rope import position_ids
from ernie_model.tokenizer import load_tiny_tokenizer, tiny_tokenizer_ids
from train.certificate import Certifier, picture, place_ids
from train.export import export_checkpoint
from train.inference_config import Certify, ExportConfig, Layout
from vllm_plugin.fixes import FIXES

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM; `make test-vllm` sets it"),
]
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CASES = ROOT / "tests/ernie_model/inference/parser_cases.json"
CONFIG = ErnieConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # the smallest that vLLM's attention on the CPU knows
    intermediate_size=128,
    max_position_embeddings=2048,
    num_experts=8,
    experts_per_token=2,
    text_expert_width=32,
    vision_expert_width=32,
    num_shared_experts=1,
    sparse_layers=(1, 2),
    initializer_range=0.1,
    mrope_section=(6, 6, 4),
    vision=VisionConfig(depth=2, hidden_size=32, num_heads=1, intermediate_size=64),
    **tiny_tokenizer_ids(),
)
FP32 = 2e-4
"""Of log-probabilities near -8: measured differences are below 1e-5, those of defects above 0.01."""


def random_model(seed: int, config: ErnieConfig = CONFIG) -> ErnieModel:
    """Values with which every defect shows: large correction biases, and patches so faint that an epsilon counts."""
    torch.manual_seed(seed)
    model = ErnieModel(config).requires_grad_(False).eval()
    for name, tensor in model.state_dict().items():
        if "correction_bias" in name:
            tensor.copy_(torch.randn_like(tensor) * 0.2)
        elif ".router." in name:
            tensor.copy_(torch.randn_like(tensor) * 0.5)
        elif "patch_embed" in name:
            tensor.mul_(0.001)
        elif tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two models of different weights, in vLLM's layout."""
    return [exported(random_model(seed), tmp_path_factory.mktemp("models")) for seed in (0, 1)]


def exported(model: ErnieModel, root: Path) -> Path:
    with atomic_folder(root / "plain") as temporary:
        write_model(model, temporary)
        Processor(load_tiny_tokenizer(), model.config).save(temporary)
    config = ExportConfig(checkpoint=str(root / "plain"), output=str(root / "out"), layout=Layout.vllm)
    config.certify = Certify.none
    return export_checkpoint(config)[0]


@pytest.fixture(scope="module")
def models(folders) -> list[ErnieModel]:
    return [load_model(folder).eval() for folder in folders]


def ids_with(*parts: int | str, images: int = 0, place: int | None = None) -> list[int]:
    """Numbers of text tokens, and "image": 6 placeholders, or the one that vLLM puts an image at."""
    random, out = torch.Generator().manual_seed(len(parts)), []
    for part in parts:
        if isinstance(part, int):
            out += torch.randint(300, 900, (part,), generator=random).tolist()
        else:
            inner = [CONFIG.image_token_id] * 6 if place is None else [place]
            out += [CONFIG.image_start_token_id, *inner, CONFIG.image_end_token_id]
    return out


PROMPTS = {"text": (40,), "image": (5, "image", 9), "apart": (25, "image", 20), "two": (3, "image", 4, "image", 6)}
"""`apart`: with 32 tokens a step, IMAGE_END is the first token of the second step, and its image was in the first."""


def task(folders: list[Path], scratch: Path, events: list, *, batched: int = 256, caching: bool = False) -> dict:
    prompts = {}
    for name, parts in PROMPTS.items():
        images = []
        for number in range(parts.count("image")):
            images.append(str(scratch / f"{name}{number}.png"))
            picture(84, 56, number).save(images[-1])
        prompts[name] = {"ids": ids_with(*parts, place=place_ids(folders[0])["image"]), "images": images}
    return dict(folder=str(folders[0]), batched_tokens=batched, prefix_caching=caching, prompts=prompts, events=events)


def ask(said: dict, scratch: Path, *, without: tuple[str, ...] = ()) -> dict:
    """Run ask_offline.py under vLLM's Python."""
    (scratch / "task.json").write_text(json.dumps(said))
    fixes = ",".join(name for name in FIXES if name not in without)
    done = subprocess.run(
        [PYTHON, str(HERE / "ask_offline.py"), str(scratch / "task.json"), str(scratch / "out.json")],
        env=environment(ERNIE_VLLM_FIXES=fixes),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((scratch / "out.json").read_text())


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHON"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def difference(model: ErnieModel, name: str, answer: dict) -> float:
    """Of the log-probabilities, ours and vLLM's, of prompt and greedy answer; infinite where the answers differ."""
    parts = PROMPTS[name]
    prompt = ids_with(*parts)
    assert answer["ids"] == prompt
    images = [
        image_patches(picture(84, 56, number), Processor(load_tiny_tokenizer(), CONFIG).image) for number in (0, 1)
    ]
    images = images[: parts.count("image")]
    ids = torch.tensor(prompt + answer["new"])
    grids = [grid for _, grid in images]
    with torch.no_grad():
        out = model(
            ids,
            position_ids(ids, grids, CONFIG),
            Packed([len(ids)]),
            patch_PX=torch.cat([torch.from_numpy(patch) for patch, _ in images]) if images else None,
            grids=grids,
        )
        logprob_TV = model.logits(out.hidden_TD).log_softmax(-1)
    mine = logprob_TV[:-1].gather(1, ids[1:, None])[:, 0]
    theirs = torch.tensor(answer["logprobs"] + answer["new_logprobs"])
    return (mine[-len(theirs) :] - theirs).abs().max().item()


# ------------------------------------------------------------------------------------------------------ in one process


@pytest.fixture(scope="module")
def offline(folders, tmp_path_factory) -> dict:
    """One engine with all fixes; some of them taken away and put back while it runs."""
    events = [["ask", name, name] for name in PROMPTS] + [["ask", "in two steps", "text", 5]]
    for fix, prompt in (("delimiters", "apart"), ("router", "text")):
        events += [["without", fix], ["ask", f"without {fix}", prompt], ["with", fix]]
    events += [["reload", str(folders[1])], ["ask", "updated text", "text"], ["ask", "updated image", "image"]]
    events += [["without", "experts"], ["reload", str(folders[0])], ["ask", "without experts", "text"]]
    events += [["with", "experts"], ["reload", str(folders[0])], ["ask", "back", "two"]]
    scratch = tmp_path_factory.mktemp("offline")
    out = ask(task(folders, scratch, events, batched=32), scratch)
    assert "error" not in out, out["error"]
    assert out["applied"] == list(FIXES)
    return out


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_greedy_answers_are_ours(offline, models, name):
    assert difference(models[0], name, offline[name]) < FP32


def test_weights_can_be_changed(offline, models):
    for name in ("text", "image"):
        assert difference(models[1], name, offline[f"updated {name}"]) < FP32
        assert difference(models[0], name, offline[f"updated {name}"]) > 0.1
    assert difference(models[0], "two", offline["back"]) < FP32


@pytest.mark.parametrize("fix", ["delimiters", "router", "experts"])
def test_a_fix_is_still_needed(offline, models, fix):
    prompt = "apart" if fix == "delimiters" else "text"
    assert difference(models[0], prompt, offline[f"without {fix}"]) > 50 * FP32


def test_fixes_of_what_is_built_are_still_needed(folders, models, tmp_path):
    """The norms of the vision tower have another epsilon without one fix, a tied head grows old without the other."""
    events = [
        ["ask", "text", "text"],
        ["ask", "image", "image"],
        ["reload", str(folders[1])],
        ["ask", "updated", "text"],
    ]
    out = ask(task(folders, tmp_path, events), tmp_path, without=("vision_eps", "tied_head"))
    assert "error" not in out, out["error"]
    assert difference(models[0], "text", out["text"]) < FP32
    assert difference(models[0], "image", out["image"]) > 10 * FP32
    assert difference(models[1], "text", out["updated"]) > 50 * FP32


def test_the_fix_of_seeds_is_still_needed(offline, folders, tmp_path):
    """Random numbers are those of the seed in one step or in two; without the fix, two end the server."""
    out = ask(task(folders, tmp_path, [["ask", "in one step", "text", 5]]), tmp_path)
    assert out["in one step"]["new"] == offline["in two steps"]["new"] != offline["text"]["new"]
    out = ask(task(folders, tmp_path, [["ask", "text", "text", 5]], batched=32), tmp_path, without=("seeds",))
    assert "Generator does not use offset" in out["error"] or "failed" in out["error"].lower()


def test_the_fix_of_the_rotary_positions_is_still_needed(folders, tmp_path):
    out = ask(task(folders, tmp_path, [["ask", "text", "text"]]), tmp_path, without=("rotary",))
    assert "TypeError" in out["error"] or "failed" in out["error"].lower()


def test_a_certificate_by_vllm(folders, models):
    verdict = Certifier(models[0], Processor(load_tiny_tokenizer(), CONFIG)).vllm(folders[0], PYTHON)
    assert verdict.program == "vllm 0.32.0" and verdict.holds
    assert [one.case for one in verdict.comparisons] == ["text", "conversation", "image", "two images", "video"]
    assert all(one.greedy_agreement == one.routing_agreement == 1 for one in verdict.comparisons)


def test_a_certificate_by_vllm_is_refused_for_other_weights(folders, models):
    verdict = Certifier(models[1], Processor(load_tiny_tokenizer(), CONFIG)).vllm(folders[0], PYTHON)
    assert not any(one.holds for one in verdict.comparisons)


# ----------------------------------------------------------------------------------------------------------- its server


class Serving:
    """`vllm serve` on a free port; the plugin comes by its entry point. Use as a context."""

    def __init__(self, folder: Path, log: Path, *options: str, **variables: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.command = [str(Path(PYTHON).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1"]
        self.command += ["--port", str(port), "--served-model-name", "tiny", "--trust-remote-code"]
        self.command += [
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "512",
            "--max-num-seqs",
            "4",
            *options,
        ]
        self.variables = environment(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind") | variables

    def start(self) -> None:
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                self.command, env=self.variables, stdout=out, stderr=out, start_new_session=True
            )

    def wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def stop(self, signal: int = 15) -> None:
        os.killpg(self.process.pid, signal)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()

    def __enter__(self) -> "Serving":
        self.start()
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.stop()


@pytest.fixture(scope="module")
def client(folders, tmp_path_factory):
    options = ["--reasoning-parser", "ernie45", "--enable-auto-tool-choice", "--tool-call-parser", "ernie45"]
    options += ["--structured-outputs-config", '{"enable_in_reasoning": true}']
    with Serving(folders[0], tmp_path_factory.mktemp("server") / "log", *options) as one:
        yield openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", timeout=300, max_retries=0)


@pytest.mark.parametrize("with_image", [False, True])
def test_a_chat_by_the_openai_client(client, models, with_image):
    image = picture(112, 84, 5)
    content, mine = [], []
    if with_image:
        file = io.BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
        mine.append({"type": "image", "image": image})
    for parts in (content, mine):
        parts.append({"type": "text", "text": "What do you see? 12"})
    banned = {str(token): -100 for token in CONFIG.vision_pool_token_ids}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        logit_bias=banned,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    encoded = Processor(load_tiny_tokenizer(), CONFIG).encode(
        [{"role": "user", "content": mine}], add_generation_prompt=True
    )
    assert answer.prompt_token_ids == encoded.token_T.tolist()
    new = answer.choices[0].token_ids
    ids = torch.cat([encoded.token_T, torch.tensor(new)])
    with torch.no_grad():
        positions = position_ids(ids, encoded.grids, CONFIG)
        out = models[0](ids, positions, Packed([len(ids)]), patch_PX=encoded.patch_PX, grids=encoded.grids)
        logprob_TV = models[0].logits(out.hidden_TD).log_softmax(-1)[len(encoded.token_T) - 1 : -1]
    theirs = torch.tensor([one.logprob for one in answer.choices[0].logprobs.content])
    assert (logprob_TV.gather(1, torch.tensor(new)[:, None])[:, 0] - theirs).abs().max() < FP32
    assert len(new) == 12
    logprob_TV[:, list(CONFIG.vision_pool_token_ids)] = -torch.inf
    assert logprob_TV.argmax(-1).tolist() == new


def test_reasoning_and_tool_calls_of_its_server(client):
    """A text that the model is made to write comes back apart."""
    text = 'abc\n</think>\n\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "go"}],
        tools=tools,
        temperature=0,
        max_tokens=200,
        extra_body={
            "structured_outputs": {"choice": [text]},
            "chat_template_kwargs": {"enable_thinking": True},
            "skip_special_tokens": False,
        },
    )
    message = answer.choices[0].message
    assert getattr(message, "reasoning", None) == "abc\n" or message.model_extra.get("reasoning_content") == "abc\n"
    (call,) = message.tool_calls
    assert call.function.name == "f" and json.loads(call.function.arguments) == {"x": 1}


def test_parsers_on_the_shared_cases(folders, tmp_path):
    """Our own parsers are held to the same file (tests/ernie_model/inference/test_parsing.py)."""
    cases = json.loads(CASES.read_text("utf-8"))
    command = [PYTHON, str(HERE / "ask_parsers.py"), str(folders[0]), str(CASES), str(tmp_path / "out.json")]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert len(found) == len(cases) >= 50
    for theirs, case in zip(found, cases, strict=True):
        shared = case.keys() & theirs.keys()
        assert len(shared) >= 2 and {key: theirs[key] for key in shared} == {key: case[key] for key in shared}
