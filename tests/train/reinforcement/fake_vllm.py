"""A server that speaks the endpoints of vLLM 0.32 that rollouts use, and computes with the suite's own model.

It reads the weights that it is pushed from their folder, cuts pictures out of the PNGs that it is sent and expands
placeholders itself, so what comes back is right only if all of that was right. `faults` make it err.
"""

import base64
import io
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image

from ernie_model.checkpoint import load_model
from ernie_model.context import Packed
from ernie_model.images import image_patches
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import Finish, MediaItem, Prompt, SamplingParams
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.rope import num_media_tokens, position_ids
from train.vllm_layout import PLACES
from vllm_plugin.transfer import BACKEND, check_sizes, open_folder


class Crash(Exception):
    """Break off the connection without an answer."""


@dataclass
class State:
    """What a process of the server knows; a restart begins anew."""

    model: ErnieModel
    label: str = "default"
    paused: bool = False
    updating: bool = False
    never: list[list[int]] = field(default_factory=list)


class FakeVLLM:
    """Use as a context; `url` is where it is.

    Attributes:
        said: (method and path, body) of all requests, in order.
        faults: path -> what happens instead, one for each request, first come first. A function gets the right answer's
            JSON and returns another; a number is a status; Crash breaks off.
    """

    def __init__(
        self,
        model: ErnieModel,
        processor: Processor,
        *,
        max_model_len: int = 512,
        logprobs_mode: str = "processed_logprobs",
        backend: str | None = BACKEND,
        dtype: str = "float32",
    ):
        self.start_model, self.processor = model, processor
        self.max_model_len, self.logprobs_mode, self.backend, self.dtype = max_model_len, logprobs_mode, backend, dtype
        self.absent: set[str] = set()
        """Paths that it does not have."""
        self.said: list[tuple[str, Any]] = []
        self.faults: dict[str, list[Callable[[Any], Any] | int | type[Crash]]] = defaultdict(list)
        self.on_request: Callable[[str], None] = lambda path: None
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    def start(self) -> None:
        self.state = State(self.start_model)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer("GET", None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                self.answer("POST", json.loads(body) if body else None)

            def answer(self, method: str, body: Any) -> None:
                try:
                    status, out = fake.serve(method, self.path, body)
                except Crash:
                    self.close_connection = True
                    return
                data = json.dumps(out).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.alive = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        if self.alive:
            self.alive = False
            self.http.shutdown()
            self.http.server_close()

    def __enter__(self) -> "FakeVLLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def count(self, path: str) -> int:
        return sum(one.partition(" ")[2].partition("?")[0] == path for one, _ in self.said)

    # ----------------------------------------------------------------------------------------------------- its routes

    def serve(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        path = urlsplit(url).path
        self.said.append((f"{method} {url}", body))
        self.on_request(path)
        if not self.alive:
            raise Crash
        if path in self.absent:
            return 404, {"detail": "Not Found"}
        fault = self.faults[path].pop(0) if self.faults[path] else None
        if fault is Crash:
            raise Crash
        if isinstance(fault, int):
            return fault, {"error": {"message": "made to fail"}}
        status, out = getattr(self, path.strip("/").replace("/", "_").replace("v1_", ""))(body)
        if not self.alive:
            raise Crash
        return status, fault(out) if callable(fault) else out

    def models(self, body: Any) -> tuple[int, Any]:
        return 200, {"data": [{"id": "tiny", "max_model_len": self.max_model_len}]}

    def server_info(self, body: Any) -> tuple[int, Any]:
        model = {"logprobs_mode": self.logprobs_mode, "dtype": f"torch.{self.dtype}"}
        transfer = None if self.backend is None else {"backend": self.backend}
        return 200, {"vllm_config": {"model_config": model, "weight_transfer_config": transfer}}

    def tokenize(self, body: Any) -> tuple[int, Any]:
        tokenizer = self.processor.tokenizer
        for number, place in enumerate(PLACES.values()):
            if body["prompt"] == place:
                return 200, {"tokens": [tokenizer.vocab_size + number]}
        return 200, {"tokens": tokenizer.encode_markup(body["prompt"])}

    def weight_info(self, body: Any) -> tuple[int, Any]:
        return 200, {"weight_version": self.state.label}

    def is_paused(self, body: Any) -> tuple[int, Any]:
        return 200, {"is_paused": self.state.paused}

    def pause(self, body: Any) -> tuple[int, Any]:
        self.state.paused = True
        return 200, {}

    def resume(self, body: Any) -> tuple[int, Any]:
        self.state.paused = False
        return 200, {}

    def update_weight_version(self, body: Any) -> tuple[int, Any]:
        self.state.label = body["new_version"]
        return 200, {}

    def start_weight_update(self, body: Any) -> tuple[int, Any]:
        if self.state.updating:
            return 500, {"error": {"message": "start_weight_update called while a weight update is already active."}}
        self.state.updating = True
        return 200, {}

    def update_weights(self, body: Any) -> tuple[int, Any]:
        info = body["update_info"]
        if not self.state.updating:
            return 500, {"error": {"message": "start_weight_update must be called before update_weights."}}
        try:
            open_folder(info["folder"], info["digest"])
            model = load_model(Path(info["folder"])).eval()
            check_sizes(SimpleNamespace(**self.start_model.config.to_flat_json()), info["config"])
        except (OSError, ValueError) as error:
            self.state.updating = False
            return 500, {"error": {"message": str(error)}}
        self.state.model, self.state.never = model, info["never"]
        return 200, {}

    def finish_weight_update(self, body: Any) -> tuple[int, Any]:
        if not self.state.updating:
            return 500, {"error": {"message": "finish_weight_update called without a matching start_weight_update."}}
        self.state.updating = False
        self.state.label = body.get("weight_version") or self.state.label
        return 200, {}

    def reset_prefix_cache(self, body: Any) -> tuple[int, Any]:
        return 200, {"success": True}

    def reset_mm_cache(self, body: Any) -> tuple[int, Any]:
        return 200, {}

    reset_encoder_cache = reset_mm_cache

    def inference_generate(self, body: Any) -> tuple[int, Any]:
        if not body["token_ids"]:
            return 400, {"error": {"message": "List should have at least 1 item after validation, not 0"}}
        while self.state.paused and self.alive:
            time.sleep(0.005)
        with self.lock:
            return 200, self.sampled(body)

    # -------------------------------------------------------------------------------------------------------- sampling

    def sampled(self, body: Any) -> Any:
        prompt, said = self.expanded(body), body["sampling_params"]
        model, label = self.state.model, self.state.label
        bias = {int(token): value for token, value in said.get("logit_bias", {}).items()}
        params = SamplingParams(
            max_new_tokens=said["max_tokens"],
            temperature=said.get("temperature", 1.0),
            top_p=said.get("top_p", 1.0),
            top_k=said.get("top_k", 0),
            min_p=said.get("min_p", 0.0),
            seed=said.get("seed"),
            ignore_end=True,
            stop_ids=tuple(said.get("stop_token_ids", ())),
            stop=tuple(said.get("stop", ())),
            logit_bias=bias,
        )
        engine = Engine(model, self.processor.tokenizer, EngineSettings(cache_gib=0.02))
        (done,) = engine.generate([prompt], params)
        content = [{"token_id": t, "logprob": value} for t, value in zip(done.token_ids, done.logprobs, strict=True)]
        choice = {
            "token_ids": list(done.token_ids),
            "finish_reason": "stop" if done.finish is Finish.STOP else "length",
            "stop_reason": done.stop,
            "logprobs": {"content": content},
            "weight_versions": [{"version": label, "start": 0, "end": len(done.token_ids)}],
        }
        out = {"choices": [choice], "prompt_token_ids": list(prompt.token_ids)}
        if "prompt_logprobs" in said:
            out["prompt_logprobs"] = self.of_prompt(prompt)
        return out

    def expanded(self, body: Any) -> Prompt:
        config, images = self.processor.config, []
        for part in body.get("content_parts", []):
            data = base64.b64decode(part["url"].partition("base64,")[2])
            patches, grid = image_patches(Image.open(io.BytesIO(data)).convert("RGB"), self.processor.image)
            images.append(MediaItem(grid, torch.from_numpy(patches)))
        ids, left = [], list(images)
        for token in body["token_ids"]:
            if token == self.processor.tokenizer.vocab_size:
                ids += [config.image_token_id] * num_media_tokens(left.pop(0).grid)
            else:
                ids.append(token)
        assert not left
        return Prompt(tuple(ids), tuple(images))

    @torch.no_grad()
    def of_prompt(self, prompt: Prompt) -> list[Any]:
        ids, grids = torch.tensor(prompt.token_ids), [item.grid for item in prompt.media]
        patch_PX = torch.cat([item.patch_PX for item in prompt.media]) if prompt.media else None
        model = self.state.model
        positions = position_ids(ids, grids, model.config)
        out = model(ids, positions, Packed([len(ids)]), patch_PX=patch_PX, grids=grids)
        logit_TV = model.logits(out.hidden_TD)
        for start, stop in self.state.never:
            logit_TV[:, start:stop] = -torch.inf
        logprob_TV = logit_TV.log_softmax(-1).clamp(min=-9999.0)
        return [None, *({str(t): {"logprob": logprob_TV[n, t].item()}} for n, t in enumerate(prompt.token_ids[1:]))]
