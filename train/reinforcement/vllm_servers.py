"""A vLLM server as a training run needs it: asked whether it will do, given weights, given them again when it died.

One push, while requests in flight wait and go on with the new weights:

    pause ─► label "none" ─► start ─► update (the folder) ─► finish, label ─► caches emptied ─► resume

The label says which weights a token was sampled with, and it is written when they are all there. A trainer that is
killed on the way leaves a server that waits, under a label that no run knows; the next start pushes before it asks.

Source: vLLM 0.32, entrypoints/rl/online/api_router.py.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ernie_model.processor import Processor
from train.reinforcement.vllm_requests import Places, VLLMError
from train.reinforcement.wire import Reply, Unreachable, ask
from train.vllm_layout import PLACES
from vllm_plugin.transfer import BACKEND

QUICK_S = 30.0
"""For questions that need no computing."""
NONE = "none"
"""The label of weights that are being changed."""
SAMPLE = "The quick brown fox, 0123456789 ~ naïve, 你好, ошибка.\n\tdef f(x): return x"
COMMAND = "docs/rl_vllm.md has the command."


class Refused(Exception):
    """The server has answered that it cannot."""

    def __init__(self, path: str, reply: Reply):
        super().__init__(f"{path} says {reply.status}: {reply.said()}")
        self.status = reply.status


@dataclass(frozen=True, kw_only=True)
class Push:
    """Weights that servers read."""

    label: str
    folder: Path
    digest: str
    """Of its names and shapes (vllm_plugin/transfer.py)."""
    never: Sequence[tuple[int, int]] = ()
    """Ranges of ids that are never sampled."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """As config.json."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a server says of itself."""

    max_context: int
    dtype: str
    places: Places | None


@dataclass(eq=False)
class Server:
    """
    Attributes:
        alive: it has the weights, as far as is known.
        running: requests of this process that it works at.
    """

    url: str
    push_s: float = 3600.0
    """For one push."""
    alive: bool = False
    running: int = 0
    problem: str = ""
    """Why it is not alive."""
    _lock: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    @property
    def lock(self) -> asyncio.Lock:
        """For `renew`, of the event loop that runs."""
        loop = asyncio.get_running_loop()
        if self._lock is None or self._lock[0] is not loop:
            self._lock = loop, asyncio.Lock()
        return self._lock[1]

    async def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float = QUICK_S) -> Reply:
        """Raises Unreachable."""
        key = os.environ.get("VLLM_API_KEY")
        headers: Mapping[str, str] = {"Authorization": f"Bearer {key}"} if key else {}
        return await ask(self.url, method, path, body, timeout_s=timeout_s, headers=headers)

    async def told(self, method: str, path: str, body: Any = None, *, timeout_s: float = QUICK_S) -> Any:
        """The answer's JSON; None where it has none.

        Raises:
            Unreachable, Refused: see there.
        """
        reply = await self.ask(method, path, body, timeout_s=timeout_s)
        if not reply.ok:
            raise Refused(path, reply)
        return reply.json() if reply.body else None

    # ------------------------------------------------------------------------------------------------------- will it do

    async def look(self, processor: Processor, *, max_tokens: int) -> About:
        """
        Args:
            max_tokens: of the longest episode.

        Raises:
            VLLMError: it is not there, or not started as a training run needs it.
        """
        try:
            return await self._look(processor, max_tokens)
        except Unreachable as error:
            raise VLLMError(
                f"rollout.vllm.urls names {self.url}, which cannot be reached ({error}). Start the server first and "
                f"wait until {self.url}/health answers. {COMMAND}"
            ) from error

    async def _look(self, processor: Processor, max_tokens: int) -> About:
        models = await self._found("/v1/models", "it is no vLLM server")
        about = (await self._found("/server_info?config_format=json", "start it with VLLM_SERVER_DEV_MODE=1"))[
            "vllm_config"
        ]
        model, transfer = about["model_config"], about.get("weight_transfer_config") or {}
        if (mode := model.get("logprobs_mode")) != "processed_logprobs":
            self._wrong(
                f"has --logprobs-mode {mode}: log-probabilities before temperature and bans. Start it with "
                "--logprobs-mode processed_logprobs"
            )
        if (backend := transfer.get("backend")) != BACKEND:
            self._wrong(
                f"takes weights by {backend or 'nothing'}. Install this suite beside vLLM (pip install --no-deps) and "
                f"""start it with --weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
            )
        max_context = int(models["data"][0]["max_model_len"])
        if max_context < max_tokens:
            self._wrong(
                f"takes {max_context} tokens (--max-model-len), and agent.max_tokens is {max_tokens}. Raise the one or "
                "lower the other"
            )
        await self._check_tokenizer(processor)
        places = None if processor.config.vision is None else await self._places()
        await self._check_generates()
        return About(max_context=max_context, dtype=str(model.get("dtype", "")).removeprefix("torch."), places=places)

    async def _found(self, path: str, otherwise: str) -> Any:
        reply = await self.ask("GET", path)
        if reply.status == 404:
            self._wrong(f"has no {path.partition('?')[0]}: {otherwise}")
        if not reply.ok:
            self._wrong(f"answers {path} with {reply.status}, {reply.said()}")
        return reply.json()

    def _wrong(self, problem: str) -> NoReturn:
        raise VLLMError(f"rollout.vllm.urls names {self.url}, which {problem}. {COMMAND}")

    async def _tokens(self, text: str) -> list[int]:
        return (await self.told("POST", "/tokenize", {"prompt": text, "add_special_tokens": False}))["tokens"]

    async def _check_tokenizer(self, processor: Processor) -> None:
        try:
            theirs = await self._tokens(SAMPLE)
        except Refused as error:
            self._wrong(f"cannot tokenise ({error})")
        if theirs != processor.tokenizer.encode_markup(SAMPLE):
            self._wrong("has another tokenizer than the model that trains. Serve a folder that was exported from it")

    async def _places(self) -> Places:
        ids = [await self._tokens(place) for place in PLACES.values()]
        if any(len(one) != 1 for one in ids):
            self._wrong(
                f"has no token {next(iter(PLACES.values()))!r}. Serve a folder that `ernie export layout=vllm` wrote"
            )
        return Places(image=ids[0][0], video=ids[1][0])

    async def _check_generates(self) -> None:
        """It must not sample: a run that was killed may have left the server waiting."""
        reply = await self.ask("POST", "/inference/v1/generate", {"token_ids": [], "sampling_params": {}})
        if reply.status == 404:
            self._wrong("has no /inference/v1/generate: start it with --enable-scale-out")

    # ---------------------------------------------------------------------------------------------------------- weights

    async def label(self) -> str:
        """Of the weights that it has.

        Raises:
            Unreachable, Refused: see there.
        """
        return (await self.told("GET", "/weight_info"))["weight_version"]

    async def push(self, push: Push, *, retries: int, wait_s: float = 1.0) -> None:
        """Give it these weights; `alive` says afterwards whether it has them, `problem` why not.

        Args:
            wait_s: before the second try; each further one waits twice as long.
        """
        self.alive = False
        for number in range(retries + 1):
            if number:
                await asyncio.sleep(wait_s * 2 ** (number - 1))
            try:
                await self._push(push)
            except (Unreachable, Refused) as error:
                self.problem = str(error)
            else:
                self.alive, self.problem = True, ""
                return

    async def renew(self, push: Push, *, retries: int) -> None:
        """See what it has, and push if that is something else."""
        async with self.lock:
            try:
                self.alive = (
                    await self.label() == push.label and not (await self.told("GET", "/is_paused"))["is_paused"]
                )
            except (Unreachable, Refused) as error:
                self.alive, self.problem = False, str(error)
                return
            if not self.alive:
                await self.push(push, retries=retries)

    async def _push(self, push: Push) -> None:
        await self.told("POST", "/pause?mode=keep", timeout_s=self.push_s)
        await self.told("POST", "/update_weight_version", {"new_version": NONE})
        try:
            await self.told("POST", "/start_weight_update")
        except Refused:  # a run that was killed has begun an update and not finished it
            await self.told("POST", "/finish_weight_update", {})
            await self.told("POST", "/start_weight_update")
        info = {
            "folder": str(push.folder),
            "digest": push.digest,
            "never": [list(one) for one in push.never],
            "config": dict(push.config),
        }
        await self.told("POST", "/update_weights", {"update_info": info}, timeout_s=self.push_s)
        await self.told("POST", "/finish_weight_update", {"weight_version": push.label}, timeout_s=self.push_s)
        # Keys, values and features of pictures are of the old weights. Requests in flight compute theirs anew.
        emptied = await self.told("POST", "/reset_prefix_cache?reset_running_requests=true", timeout_s=self.push_s)
        if not emptied.get("success"):
            await self.told("POST", "/update_weight_version", {"new_version": NONE})
            raise Unreachable("its prefix cache could not be emptied")
        await self.told("POST", "/reset_mm_cache", timeout_s=self.push_s)
        await self.told("POST", "/reset_encoder_cache", timeout_s=self.push_s)
        await self.told("POST", "/resume")


def ranges(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted ids as ranges, each from its first id up to before its second number: 3 4 5 9 -> (3, 6) (9, 10)."""
    out: list[tuple[int, int]] = []
    for one in ids:
        if out and out[-1][1] == one:
            out[-1] = (out[-1][0], one + 1)
        else:
            out.append((one, one + 1))
    return out
