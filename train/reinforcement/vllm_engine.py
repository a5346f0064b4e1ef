"""`rollout.backend=vllm`: attempts are sampled by vLLM servers, which get the weights at the start of each rollout.

    begin    weights ──► FOLDER/weights-LABEL (all ranks write) ──► every server reads them ──► the first time: parity
    generate a prompt goes to the server that has its beginning in its cache, else to the one with least to do
             ◄── ids, log-probabilities, label of the weights of each token; all of it is checked (vllm_requests.py)
    end      nothing: the servers keep the weights until the next push

Whoever dies is noticed. A request that gets no answer is asked again, of another server if need be: prompts, parameters
and seeds are ours, so nothing is lost but time. A server that comes back with other weights says so by their label, its
answers are thrown away, and it is given the right ones.

Every rank asks for its own attempts; rank 0 alone pushes, but for servers that come back in the middle of a rollout.
"""

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch

from ernie_model.checkpoint import write_tensors
from ernie_model.expert_parallel import Shard
from ernie_model.inference.entry import Entry, Request
from ernie_model.inference.request import Completion, Delta, Finish, Prompt, RequestError, SamplingParams
from ernie_model.inference.sampling import Vocabulary
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train.checkpoint import all_or_none, everyones, here, shared_folder
from train.reinforcement.stopping import never, unless
from train.reinforcement.vllm_parity import Probe, compare, probes
from train.reinforcement.vllm_requests import (
    StaleWeights,
    VLLMError,
    check_params,
    check_prompt,
    to_body,
    to_completion,
)
from train.reinforcement.vllm_servers import About, Push, Refused, Server, ranges
from train.reinforcement.wire import Unreachable
from train.rl_config import VLLMConfig
from train.weights import Weights
from vllm_plugin.transfer import look

T = TypeVar("T")
PARITY_S = 600.0
"""For one prompt of the parity check."""
POLL_S = 1.0
"""Between two looks for a server, when there is none."""


class VLLMEngine:
    """A `RolloutEngine`, and its own `Generates`. All ranks make one together.

    Args:
        model: what trains.
        weights: of it; adapters are merged into what servers get.
        folder: of the run.
        max_tokens: of the longest episode, agent.max_tokens.
        params: what attempts are sampled with, to be refused now rather than at the first request; None: not known yet.
        optimizer: PyTorch's, or the one of DeepSpeed's engine: it may hold the exact weights.
        joint: a forward pass takes all ranks (`Layout.joint`).

    Raises:
        VLLMError: a server is not there, or will not do.
    """

    def __init__(
        self,
        config: VLLMConfig,
        model: ErnieModel,
        processor: Processor,
        weights: Weights,
        *,
        folder: Path,
        max_tokens: int,
        params: SamplingParams | None = None,
        optimizer: Any = None,
        joint: bool = False,
    ):
        self.config, self.model, self.processor, self.weights = config, model, processor, weights
        self.optimizer, self.joint = optimizer, joint
        self.folder = (folder / "vllm" if config.folder is None else Path(config.folder)).absolute()
        if params is not None:
            try:
                check_params(params)
            except RequestError as error:
                raise VLLMError(f"sampling.{error}") from error
        self.servers = [Server(url.rstrip("/"), push_s=config.timeout_s) for url in config.urls]
        looked = all_or_none(self.folder, 0, lambda: asyncio.run(self._look(max_tokens)) if here()[0] == 0 else [])
        self.about: list[About] = looked[0]
        vocabulary = Vocabulary(processor.tokenizer, model.config.vocab_size, never=model.config.vision_pool_token_ids)
        self.max_context = min([model.config.max_position_embeddings, *(one.max_context for one in self.about)])
        self._entry = Entry(
            config=model.config,
            tokenizer=processor.tokenizer,
            vocabulary=vocabulary,
            max_context=self.max_context,
            limited_by="the servers' --max-model-len",
        )
        self.notes = [
            f"{server.url} computes in {about.dtype}, the trainer in {_name(model.activation_dtype)}: start it with "
            f"--dtype {_name(model.activation_dtype)}."
            for server, about in zip(self.servers, self.about, strict=True)
            if about.dtype != _name(model.activation_dtype)
        ]
        """For the user."""
        self._session = everyones(secrets.token_hex(4))[0]
        self._push: Push | None = None
        self._versions: dict[str, int] = {}
        self._begun = self._compared = self._pushing = False
        self._turn = here()[0]
        self._homes: dict[int, Server] = {}
        self._home: ContextVar[tuple[Server, tuple[int, ...]] | None] = ContextVar("home", default=None)
        self._metrics: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------- a RolloutEngine

    @property
    def generates(self) -> "VLLMEngine":
        return self

    def begin(self, version: int) -> None:
        """Write the weights and have every server read them, unless they are those of the last time.

        Raises:
            VLLMError: no server has them; a server computes something else than the trainer.
            UserError: the disk is full, or a rank does not see the folder.
        """
        counted = ("vllm_retries", "vllm_stale_answers", "vllm_renewals")
        counted += ("engine_sampled_tokens", "engine_prompt_tokens", "engine_cached_tokens")
        self._metrics = dict.fromkeys(counted, 0.0)
        self._homes.clear()
        started = time.perf_counter()
        if self._push is None or self._versions[self._push.label] != version:
            self._push = self._write(version)
            self._versions[self._push.label] = version
        written = time.perf_counter()
        act = (lambda: asyncio.run(self._push_to_all())) if here()[0] == 0 else (lambda: None)
        self._pushing = True
        try:
            alive = all_or_none(self.folder, 0, act)[0]
        finally:
            self._pushing = False
        assert alive is not None
        for server, problem in zip(self.servers, alive, strict=True):
            server.alive, server.problem = problem is None, problem or ""
        self._begun, pushed = True, time.perf_counter()
        self._metrics |= {
            "vllm_write_s": written - started,
            "vllm_load_s": pushed - written,
            "vllm_servers": float(sum(server.alive for server in self.servers)),
        }
        if not self._compared:
            self._check_parity()
            self._metrics["vllm_parity_s"] = time.perf_counter() - pushed
            self._compared = True

    async def together(self, attempts: Sequence[Coroutine[Any, Any, T]], stop: Callable[[], bool] = never) -> list[T]:
        """Run attempts, all at once; what each returns, in order. What is asked of servers is taken back at the end."""
        return await unless(stop, attempts)

    def end(self) -> None:
        self._homes.clear()

    def metrics(self) -> dict[str, float]:
        """Of the last rollout: seconds that a push took (written, loaded), servers at work, requests asked again."""
        return self._metrics

    def close(self) -> None:
        """Servers keep the last weights; the files go."""
        if here()[0] == 0:
            self._remove(keep=None)

    # -------------------------------------------------------------------------------------------------------- weights

    def _write(self, version: int) -> Push:
        config, (rank, world) = self.model.config, here()
        label = f"{self._session}.{version}"
        path = self.folder / f"weights-{label}"
        narrow = self.model.activation_dtype
        dtype = narrow if narrow.itemsize < torch.float32.itemsize else None  # as the trainer rounds them
        if rank == 0:
            self._remove(keep=self._push)
        with self.weights.whole(self.folder, "whole", self.optimizer) as values:
            needed = values.num_bytes
            with shared_folder(path, needed) as temporary:

                def write() -> None:
                    shard = Shard(rank, world)
                    write_tensors(config, values.tensors, temporary, read=values.read, dtype=dtype, writer=shard)

                all_or_none(path, needed, write)
        never = ranges(self._entry.vocabulary.banned_ids)
        said = config.to_json() if config.vision is None else config.to_flat_json()
        return Push(label=label, folder=path, digest=look(path)[1], never=never, config=said)

    def _remove(self, keep: Push | None) -> None:
        """Weights of earlier pushes, of earlier starts too, and what a killed one has left."""
        for pattern in ("weights-*", ".weights-*.partial"):
            for path in self.folder.glob(pattern):
                if keep is None or path != keep.folder:
                    shutil.rmtree(path, ignore_errors=True)

    async def _look(self, max_tokens: int) -> list[About]:
        return await asyncio.gather(*(server.look(self.processor, max_tokens=max_tokens) for server in self.servers))

    async def _push_to_all(self) -> list[str | None]:
        """Why a server does not have the weights, of each; None: it has."""
        assert self._push is not None
        push, until = self._push, time.monotonic() + self.config.patience_s
        while True:
            await asyncio.gather(*(server.renew(push, retries=self.config.retries) for server in self.servers))
            if any(server.alive for server in self.servers):
                return [None if server.alive else server.problem for server in self.servers]
            if not self._begun or time.monotonic() > until:  # at the start of a run nobody has died: it is wrong
                raise VLLMError(self._none_left("has taken the weights"))
            await asyncio.sleep(POLL_S)

    def _none_left(self, what: str) -> str:
        problems = "; ".join(f"{server.url}: {server.problem}" for server in self.servers)
        return (
            f"no server of rollout.vllm.urls {what}. {problems}. Trainer and servers must see {self.folder} under one "
            "name (rollout.vllm.folder). Put the servers right; the same command goes on from the newest checkpoint."
        )

    # --------------------------------------------------------------------------------------------------------- parity

    def _check_parity(self) -> None:
        never = self._entry.vocabulary.banned_ids
        dtypes = [getattr(torch, about.dtype) for about in self.about]
        widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        asked = probes(self.model, self.processor, never, widest, join=self.joint)
        all_or_none(self.folder, 0, lambda: asyncio.run(self._compare(asked)) if here()[0] == 0 else None)

    async def _compare(self, asked: Sequence[Probe]) -> None:
        rounded = self.model.activation_dtype.itemsize < 4 or any(about.dtype != "float32" for about in self.about)
        largest = mean = 0.0
        for number, server in enumerate(self.servers):
            for probe in asked if server.alive else ():
                difference = compare(probe, await self._prompt_logprobs(number, probe))
                largest, mean = max(largest, difference.largest), max(mean, difference.mean)
                # In 16 bits one near-tie of a router may send a token elsewhere, and its neighbours with it.
                if difference.mean <= probe.mean_bound and (rounded or difference.largest <= probe.bound):
                    continue
                raise VLLMError(
                    f"rollout.vllm.urls names {server.url}, which computes other log-probabilities than the trainer: "
                    f"in prompt {probe.name!r} they differ by {difference.largest:.3g} (mean {difference.mean:.3g}), "
                    f"rounding explains {probe.bound:.3g} (mean {probe.mean_bound:.3g}). Is another model served, "
                    "quantised, in another dtype, or without the fixes of vllm_plugin (docs/rl_vllm.md)?"
                )
        self._metrics |= {"vllm_parity_max": largest, "vllm_parity_mean": mean}

    async def _prompt_logprobs(self, number: int, probe: Probe) -> list[float]:
        """Of the prompt's tokens but the first."""
        params = SamplingParams(max_new_tokens=1, seed=0)
        request = self._entry.request(Prompt.of(probe.encoded), params, None)
        body = to_body(request, params, self.processor, self.about[number].places)
        body["sampling_params"]["prompt_logprobs"] = 0
        server = self.servers[number]
        try:
            answer = await server.told("POST", "/inference/v1/generate", body, timeout_s=PARITY_S)
        except (Unreachable, Refused) as error:
            raise VLLMError(
                f"rollout.vllm.urls names {server.url}, which cannot answer a first prompt: {error}"
            ) from error
        check_prompt(answer.get("prompt_token_ids"), request.tokens, self.processor)
        ids = answer["prompt_token_ids"]
        return [
            place[str(token)]["logprob"] for token, place in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True)
        ]

    # -------------------------------------------------------------------------------------------------- its Generates

    async def generate(self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None) -> Completion:
        """Cancelling the task cancels the request.

        Raises:
            RequestError: it cannot be honoured.
            VLLMError: what came back is not an answer to it; no server is left.
        """
        check_params(params)
        assert self._push is not None, "between begin and end"
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        doubts = 0
        while True:
            server = await self._choose(prompt, deadline)
            if server is None:
                return _timed_out(prompt)
            server.running += 1
            try:
                completion = await self._ask(server, prompt, params, deadline)
            except (Unreachable, Refused, StaleWeights) as error:
                if deadline is not None and time.monotonic() >= deadline:
                    return _timed_out(prompt)
                doubts += 1
                stale = isinstance(error, StaleWeights)
                self._metrics["vllm_stale_answers" if stale else "vllm_retries"] += 1
                if doubts > self.config.retries * len(self.servers):
                    raise VLLMError(
                        f"a request was asked {doubts} times and got no answer; the last time, {server.url}: {error}"
                    ) from error
                await self._renew(server)
            else:
                self._home.set((server, (*prompt.token_ids, *completion.token_ids)))
                self._metrics["engine_sampled_tokens"] += len(completion.token_ids)
                self._metrics["engine_prompt_tokens"] += completion.num_prompt_tokens
                self._metrics["engine_cached_tokens"] += completion.num_cached_tokens
                return completion
            finally:
                server.running -= 1

    async def stream(
        self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None
    ) -> AsyncIterator[Delta]:
        """The whole answer in one delta. Raises as `generate` does."""
        completion = await self.generate(prompt, params, timeout_s=timeout_s)
        yield Delta(completion.text, completion.token_ids, completion.logprobs, (), completion)

    async def _ask(self, server: Server, prompt: Prompt, params: SamplingParams, deadline: float | None) -> Completion:
        places = self.about[self.servers.index(server)].places

        def prepare() -> tuple[Request, dict[str, Any]]:
            request = self._entry.request(prompt, params, None)
            return request, to_body(request, params, self.processor, places)

        request, body = await asyncio.to_thread(prepare) if prompt.media else prepare()
        left_s = self.config.timeout_s if deadline is None else max(0.001, deadline - time.monotonic())
        path = "/inference/v1/generate"
        reply = await server.ask("POST", path, body, timeout_s=min(left_s, self.config.timeout_s))
        if 400 <= reply.status < 500:
            raise VLLMError(f"{server.url} refuses a request of {len(request.tokens)} tokens: {reply.said()}")
        if not reply.ok:
            raise Refused(path, reply)
        return to_completion(reply.json(), request, params, self.processor, self._versions)

    async def _choose(self, prompt: Prompt, deadline: float | None) -> Server | None:
        """A server with the weights; None: there was none until the deadline.

        Raises:
            VLLMError: there was none for `rollout.vllm.patience_s`.
        """
        until = time.monotonic() + self.config.patience_s
        while self._pushing or not any(server.alive for server in self.servers):
            if deadline is not None and time.monotonic() >= deadline:
                return None
            if self._pushing:  # by another thread
                await asyncio.sleep(POLL_S)
                continue
            if time.monotonic() >= until:
                raise VLLMError(self._none_left(f"answers, for {self.config.patience_s:g} s"))
            await asyncio.sleep(POLL_S)
            await asyncio.gather(*(self._renew(server) for server in self.servers))
        home = self._home.get()
        if home is not None and home[0].alive and prompt.token_ids[: len(home[1])] == home[1]:
            return home[0]  # the next turn of a conversation
        key = hash(prompt.token_ids)
        server = self._homes.get(key)  # another attempt at the same prompt
        if server is None or not server.alive:
            self._turn += 1  # equally idle servers take turns, and ranks begin with different ones
            order = [self.servers[(self._turn + n) % len(self.servers)] for n in range(len(self.servers))]
            server = min((one for one in order if one.alive), key=lambda one: one.running)
            self._homes[key] = server
        return server

    async def _renew(self, server: Server) -> None:
        assert self._push is not None
        while self._pushing:
            await asyncio.sleep(POLL_S)
        before = server.alive
        await server.renew(self._push, retries=self.config.retries)
        self._metrics["vllm_renewals"] += server.alive and not before


def _timed_out(prompt: Prompt) -> Completion:
    return Completion((), "", Finish.TIMEOUT, (), (), num_prompt_tokens=len(prompt.token_ids))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
