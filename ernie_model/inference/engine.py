"""The engine: many requests at once, token by token, over one model.

    add ──► waiting ──► running ──┐  each step: schedule ─► features ─► Runner.run ─► sample ─► text ─► Delta
                          ▲       │
                          └───────┘  until a terminator, a stop text, max_new_tokens, cancel, time-out or an error

`Engine` belongs to one thread; `async_engine.AsyncEngine` gives it one and serves any event loop. What a request gets
does not depend on the requests beside it, except by rounding: neither on how its prompt is cut into chunks, nor on what
of it was in the cache, nor on having lost its pages in between.

When the weights change (`weights_changed`), running requests keep their tokens, and everything before them is computed
anew with the new weights. So each token comes from one model, the one its version names, as a full forward pass of
that model would have it; a cache that mixes two models would make log-probabilities that no model has.

Shape letters:  T tokens   S rows of logits   V vocabulary   D model width   M media tokens   L sparse layers
                K experts per token
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ernie_model.config import ErnieConfig
from ernie_model.inference.entry import Entry, Request
from ernie_model.inference.features import FeatureCache, Key, media_key
from ernie_model.inference.pages import PagePool
from ernie_model.inference.request import (
    Completion,
    Delta,
    EngineFull,
    Finish,
    MediaItem,
    Prompt,
    SamplingParams,
)
from ernie_model.inference.runner import Row, Runner, StepOutput
from ernie_model.inference.sampling import Sampled, Vocabulary, prompt_logprobs, sample
from ernie_model.inference.scheduler import Scheduler, Span
from ernie_model.model import ErnieModel
from ernie_model.tokenizer import Tokenizer


@dataclass(kw_only=True)
class EngineSettings:
    """How answers are computed. None of it changes what is computed, except by rounding.

    Raises:
        ValueError: a value outside its range; it is named as on the command line.
    """

    cache_gib: float = 1.0
    """Memory of the key/value cache."""
    page_tokens: int = 16
    """Tokens of one page of the cache; prompts share whole pages."""
    step_tokens: int = 2048
    """Tokens computed in one step: of prompts, in chunks, and one for each answer being written."""
    max_running: int = 64
    """Answers written at once."""
    max_waiting: int = 1024
    """Requests taken beside `max_running`; more are refused."""
    max_context: int | None = None
    """Longest prompt with its answer, in tokens; None: what the checkpoint says."""
    share_prefixes: bool = True
    """Requests that begin alike compute the beginning once."""
    media_cache_mib: int = 256
    """Memory of computed image and video features."""
    threads: int = 0
    """CPU threads of the products, for the whole process; 0 leaves it to torch."""

    def __post_init__(self):
        for name in ("cache_gib", "page_tokens", "step_tokens", "max_running"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("max_waiting", "media_cache_mib", "threads"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        longest = self.max_context
        _check(longest is None or longest >= 2, "max_context", longest, "at least 2, or null")

    @property
    def max_requests(self) -> int:
        return self.max_running + self.max_waiting

    @property
    def full_message(self) -> str:
        rule = "engine.max_running + engine.max_waiting"
        return f"There are {self.max_requests} requests already ({rule}); try again later."


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"engine.{name} is {value}; it must be {rule}.")


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    running: int
    waiting: int
    pages_used: int
    """Pages that requests hold."""
    pages_total: int
    version: int
    # since the engine was made:
    steps: int
    prompt_tokens: int
    cached_tokens: int
    """Of these, found in the cache."""
    sampled_tokens: int
    computed_tokens: int
    """Tokens through the model; more than prompts and answers have where some were computed again."""
    preemptions: int
    """How often a request lost its pages."""
    media_computed: int
    media_cached: int
    """Images and videos whose features were there."""
    finished: Mapping[Finish, int]


class RunsSteps(Protocol):
    """What the engine needs of `runner.Runner`."""

    def media_features(self, media: Sequence[MediaItem]) -> list[Tensor]: ...
    def run(self, rows: Sequence[Row]) -> StepOutput: ...
    def weights_changed(self) -> None: ...


class Engine:
    """Not thread-safe: one thread calls it (`AsyncEngine` does). `prepare` alone may be called from others.

    Args:
        model: in evaluation mode. Whoever changes its weights calls `weights_changed`.
        runner: made from the model unless given.
        kind: what is made of it.
        clock: seconds, for time-outs.

    Raises:
        ValueError: a setting that this model cannot be run with.
    """

    def __init__(
        self,
        model: ErnieModel,
        tokenizer: Tokenizer,
        settings: EngineSettings | None = None,
        *,
        runner: RunsSteps | None = None,
        kind: type[Runner] = Runner,
        clock: Callable[[], float] = time.monotonic,
    ):
        settings = settings or EngineSettings()
        self.config, self.settings = model.config, settings
        self.version = 0
        self.clock = clock
        if settings.threads:
            torch.set_num_threads(settings.threads)
        num_pages = _num_pages(model, settings)
        self.max_context, limited_by = _max_context(model.config, settings, num_pages)
        """Longest prompt with its answer that a request may ask for, in tokens."""
        self._entry = Entry(
            config=model.config,
            tokenizer=tokenizer,
            vocabulary=Vocabulary.of(tokenizer, model.config),
            max_context=self.max_context,
            limited_by=limited_by,
        )
        self._pool = PagePool(num_pages, settings.page_tokens)
        self._scheduler = Scheduler(
            self._pool,
            step_tokens=settings.step_tokens,
            max_running=settings.max_running,
            share=settings.share_prefixes,
        )
        self.runner: RunsSteps = runner or kind(
            model, num_pages=num_pages, page_tokens=settings.page_tokens, max_rows=self._scheduler.max_running
        )
        self._features = FeatureCache(settings.media_cache_mib * 2**20)
        self._count_3T = torch.arange(self.max_context).expand(3, -1)
        self._live: dict[int, Request] = {}
        self._next_id = 0
        self._outbox: list[tuple[int, Delta]] = []
        self._mail: dict[int, deque[Delta]] = {}  # of requests that `generate` and `stream` wait for
        self._counts: Counter[str] = Counter()
        self._finished: Counter[Finish] = Counter()

    # ------------------------------------------------------------------------------------------------------ requests

    def add(self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None) -> int:
        """The request's id, by which `step` names what it writes.

        Raises:
            RequestError: it cannot be honoured.
            EngineFull: there are `max_running` + `max_waiting` requests already.
        """
        if self.full:
            raise EngineFull(self.settings.full_message)
        return self.enqueue(self.prepare(prompt, params, timeout_s=timeout_s))

    def prepare(self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None) -> Request:
        """Check a request and do what needs no other. Changes nothing: any thread may call it.

        Raises:
            RequestError: it cannot be honoured.
        """
        return self._entry.request(prompt, params, None if timeout_s is None else self.clock() + timeout_s)

    def enqueue(self, request: Request) -> int:
        """What `prepare` made joins the line, however long it is."""
        request.id, self._next_id = self._next_id, self._next_id + 1
        self._live[request.id] = request
        self._scheduler.add(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """Its pages are free at once; the next step tells its completion. Nothing happens if it is done already."""
        if (request := self._live.get(request_id)) is not None:
            self._end(request, Finish.CANCELLED)

    @property
    def full(self) -> bool:
        return len(self._live) >= self.settings.max_requests

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._outbox)

    # --------------------------------------------------------------------------------------------------------- a step

    def step(self) -> list[tuple[int, Delta]]:
        """Compute one step of all that runs; return what was written. What `generate` or `stream` waits for goes there.

        Raises:
            Exception: what the model raised. Everything is as it was before the step, which may be tried again.
        """
        now = self.clock()
        for request in [r for r in self._live.values() if r.deadline is not None and r.deadline <= now]:
            self._end(request, Finish.TIMEOUT)
        if self._live:
            self._compute()
        return self._deliver()

    def _deliver(self) -> list[tuple[int, Delta]]:
        written, self._outbox = self._outbox, []
        others = []
        for request_id, delta in written:
            if request_id in self._mail:
                self._mail[request_id].append(delta)
            else:
                others.append((request_id, delta))
        return others

    def _compute(self) -> None:
        plan = self._plan()
        if not plan:
            return
        rows = [self._row(request, count) for request, count in plan.items()]
        output = self.runner.run(rows)
        self._counts["steps"] += 1
        self._counts["computed_tokens"] += sum(plan.values())
        at, ends, sampling = 0, [], []
        for (request, count), row, expert_TLK in zip(plan.items(), rows, output.experts, strict=True):
            stop = at + row.num_logits
            if request.wants_all_logits:
                self._take_prompt_logprobs(request, output.logit_SV[at:stop], row.start + count)
            if expert_TLK is not None:
                self._keep_experts(request, row.start, expert_TLK)
            self._advance(request, count)
            if not request.left:
                sampling.append(request)
                ends.append(stop - 1)
            at = stop
        if sampling:
            logit_SV = output.logit_SV if len(ends) == at else output.logit_SV[ends]
            self._sample(sampling, logit_SV, rows, ends)

    def _plan(self) -> dict[Request, int]:
        """What is computed now, features included. Requests whose images cannot be computed end here."""
        plan: dict[Request, int] = {}
        scheduled = self._scheduler.schedule()
        assert scheduled, "the first request can always go on"
        for job, count in scheduled.items():
            assert isinstance(job, Request)
            plan[job] = count
        missing: dict[Key, MediaItem] = {}
        for request, count in plan.items():
            for span in _touched(request, count):
                key = media_key(span.item)
                if key in request.features or key in missing:
                    continue
                if (feature_MD := self._features.get(key)) is None:
                    missing[key] = span.item
                else:
                    request.features[key] = feature_MD
                    self._counts["media_cached"] += 1
        if not missing:
            return plan
        computed, errors = self._compute_features(missing)
        for request, count in list(plan.items()):
            for span in _touched(request, count):
                key = media_key(span.item)
                if key in errors:
                    del plan[request]
                    self._fail(request, f"An image or video could not be computed: {errors[key]}")
                    break
                if key in computed:
                    request.features[key] = computed[key]
        return plan

    def _compute_features(self, missing: Mapping[Key, MediaItem]) -> tuple[dict[Key, Tensor], dict[Key, str]]:
        """Features of each, or why there are none."""
        computed: dict[Key, Tensor] = {}
        errors: dict[Key, str] = {}
        try:
            computed.update(zip(missing, self.runner.media_features(list(missing.values())), strict=True))
        except Exception:  # of one of them, perhaps: the others shall not suffer
            for key, item in missing.items():
                try:
                    computed[key] = self.runner.media_features([item])[0]
                except Exception as error:
                    errors[key] = said(error)
        for key, feature_MD in computed.items():
            self._features.put(key, feature_MD)
        self._counts["media_computed"] += len(computed)
        return computed, errors

    def _row(self, request: Request, count: int) -> Row:
        start, stop = request.computed, request.computed + count
        if request.experts:
            self._record_experts(request)  # of pages that were found
        num_logits = int(stop == len(request.tokens))
        if request.wants_all_logits:
            num_logits = count
        return Row(
            token_ids=request.tokens[start:stop],
            position_3T=self._positions(request, start, stop),
            start=start,
            pages=request.pages,
            features=[
                request.features[media_key(span.item)][max(start - span.start, 0) : stop - span.start]
                for span in _touched(request, count)
            ],
            num_logits=num_logits,
            experts=request.experts,
        )

    def _positions(self, request: Request, start: int, stop: int) -> Tensor:
        if request.position_3T is None:
            return self._count_3T[:, start:stop]
        of_prompt = request.position_3T[:, start:stop]
        if stop <= request.num_prompt:
            return of_prompt
        ahead = request.next_position - request.num_prompt
        of_answer = self._count_3T[:, max(start, request.num_prompt) + ahead : stop + ahead]
        return of_answer if start >= request.num_prompt else torch.cat([of_prompt, of_answer], dim=1)

    def _advance(self, request: Request, count: int) -> None:
        first_time = not request.prompt_done
        self._scheduler.advance(request, count)
        if request.experts:
            self._record_experts(request)
        if request.features:
            for span in request.spans:
                if span.stop <= request.computed:
                    request.features.pop(media_key(span.item), None)
        if first_time and request.prompt_done:
            self._counts["prompt_tokens"] += request.num_prompt
            self._counts["cached_tokens"] += request.cached

    def _take_prompt_logprobs(self, request: Request, logit_TV: Tensor, stop: int) -> None:
        """`logit_TV`: of the tokens before `stop`; those of token t speak of token t + 1."""
        first = 1 + len(request.prompt_logprobs)  # after a preemption, some are known
        last = min(stop + 1, request.num_prompt)
        begin = stop + 1 - len(logit_TV)
        if first < last:
            rows = logit_TV[first - begin : last - begin]
            request.prompt_logprobs += prompt_logprobs(rows, request.tokens[first:last])

    # -------------------------------------------------------------------------------------------------------- experts

    def _keep_experts(self, request: Request, start: int, expert_TLK: Tensor) -> None:
        """Beside the pages, so that whoever shares them knows, too."""
        expert_TLK, size = expert_TLK.cpu(), self.settings.page_tokens
        stop, at = start + len(expert_TLK), start
        while at < stop:
            end = min((at // size + 1) * size, stop)
            self._pool.write_experts(request.pages[at // size], at % size, expert_TLK[at - start : end - start])
            at = end

    def _record_experts(self, request: Request) -> None:
        """Of what is in the cache now. What is recorded stays, though it be computed again: it is what led to the
        tokens that were sampled."""
        size = self.settings.page_tokens
        while request.num_recorded < request.computed:
            at = request.num_recorded
            end = min((at // size + 1) * size, request.computed)
            page = self._pool.experts(request.pages[at // size])
            request.expert_parts.append(page[at % size : at % size + end - at].clone())
            request.num_recorded = end

    # ------------------------------------------------------------------------------------------------ sample, and end

    def _sample(self, requests: list[Request], logit_SV: Tensor, rows: list[Row], ends: list[int]) -> None:
        try:
            sampled = sample(logit_SV, [request.sampler for request in requests])
        except Exception:
            # One request's sampler, perhaps. Logits are overwritten by sampling, so they are computed once more.
            logit_SV = self.runner.run(rows).logit_SV[ends]
            sampled = [_sample_alone(logit_SV[i : i + 1], request) for i, request in enumerate(requests)]
        for request, token in zip(requests, sampled, strict=True):
            if token.error is not None:
                for page in request.pages:
                    self._pool.forget(page)  # whatever is wrong with them, nobody else shall have it
                self._fail(request, token.error)
                continue
            try:
                self._accept(request, token)
            except Exception as error:
                self._fail(request, said(error))

    def _accept(self, request: Request, sampled: Sampled) -> None:
        token_id = sampled.token_id
        request.sampler.accept(token_id)
        text = request.detokenizer.push(token_id)
        self._scheduler.append(request, token_id)
        request.logprobs.append(sampled.logprob)
        request.versions.append(self.version)
        tops = () if sampled.top is None else (sampled.top,)
        request.tops += tops
        self._counts["sampled_tokens"] += 1
        delta = Delta(text, (token_id,), (sampled.logprob,), tops)
        if request.detokenizer.stopped is not None:
            self._end(request, Finish.STOP, delta)
        elif request.num_sampled == request.params.max_new_tokens:
            self._end(request, Finish.LENGTH, delta)
        else:
            self._outbox.append((request.id, delta))

    def _fail(self, request: Request, error: str) -> None:
        self._end(request, Finish.ERROR, error=error)

    def _end(self, request: Request, finish: Finish, last: Delta | None = None, error: str | None = None) -> None:
        """It is done: everything it held is free, and its last delta waits to be told."""
        del self._live[request.id]
        self._scheduler.remove(request)
        request.features.clear()
        self._finished[finish] += 1
        detokenizer = request.detokenizer
        tail = "" if finish is Finish.ERROR else detokenizer.finish()
        if finish is Finish.LENGTH and detokenizer.stopped is not None:
            finish = Finish.STOP  # by a stop text that ends with the last token
        last = last or Delta("")
        completion = Completion(
            token_ids=tuple(request.tokens[request.num_prompt :]),
            text=detokenizer.text,
            finish=finish,
            logprobs=tuple(request.logprobs),
            versions=tuple(request.versions),
            stop=detokenizer.stopped,
            top_logprobs=tuple(request.tops),
            prompt_logprobs=(None, *request.prompt_logprobs) if request.params.prompt_logprobs else (),
            experts=self._experts(request) if request.params.routed_experts else None,
            error=error,
            num_prompt_tokens=request.num_prompt,
            num_cached_tokens=request.cached,
        )
        delta = Delta(last.text + tail, last.token_ids, last.logprobs, last.top_logprobs, completion)
        self._outbox.append((request.id, delta))

    def _experts(self, request: Request) -> Tensor:
        shape = (len(request.tokens), len(self.config.sparse_layers), self.config.experts_per_token)
        expert_TLK = torch.full(shape, -1, dtype=torch.int16)
        if request.expert_parts:
            expert_TLK[: request.num_recorded] = torch.cat(request.expert_parts)
        return expert_TLK

    # ------------------------------------------------------------------------------------------------- whole answers

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answer all, in the order given. All are checked before the first runs; more than the engine takes at once
        follow as others end.

        Raises:
            RequestError: one of them cannot be honoured.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        requests = deque(self.prepare(*pair) for pair in zip(prompts, each, strict=True))
        done: dict[int, Completion | None] = {}  # in the order given, which is that of ids
        unanswered: set[int] = set()
        try:
            while requests or unanswered:
                while requests and not self.full:
                    request_id = self.enqueue(requests.popleft())
                    self._mail[request_id] = deque()
                    done[request_id] = None
                    unanswered.add(request_id)
                self._step_for_mail()
                for request_id in list(unanswered):
                    for delta in self._take_mail(request_id):
                        if delta.completion is not None:
                            done[request_id] = delta.completion
                            unanswered.remove(request_id)
        finally:
            self._leave(done.keys())
        return [completion for completion in done.values() if completion is not None]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[Delta]:
        """What is written, as it is; the last delta has the whole answer. Leaving the iterator cancels the request.

        Raises:
            RequestError, EngineFull: at the first delta.
        """
        request_id = self.add(prompt, params)
        self._mail[request_id] = deque()
        try:
            while True:
                self._step_for_mail()
                for delta in self._take_mail(request_id):
                    yield delta
                    if delta.completion is not None:
                        return
        finally:
            self._leave([request_id])

    def _step_for_mail(self) -> None:
        """A step on behalf of `generate` or `stream`; what others are to get waits for their `step`."""
        others = self.step()
        self._outbox += others

    def _take_mail(self, request_id: int) -> Iterator[Delta]:
        mail = self._mail[request_id]
        while mail:
            yield mail.popleft()

    def _leave(self, ids: Collection[int]) -> None:
        for request_id in ids:
            self.cancel(request_id)
        self._outbox = [(i, delta) for i, delta in self._outbox if i not in ids]
        for request_id in ids:
            del self._mail[request_id]

    # --------------------------------------------------------------------------------------------------------- others

    def weights_changed(self) -> None:
        """The model's weights are others now. Nothing computed before is used again; running requests go on, and their
        later tokens carry the new version."""
        self.version += 1
        self._scheduler.preempt_all()
        self._features.clear()
        for request in self._live.values():
            request.forget_what_old_weights_did()
        self.runner.weights_changed()

    def stats(self) -> EngineStats:
        """Other threads may ask as well; counts are then of about the same moment."""
        names = ("steps", "prompt_tokens", "cached_tokens", "sampled_tokens", "computed_tokens")
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_used=self._pool.num_used,
            pages_total=self._pool.num_pages,
            version=self.version,
            preemptions=self._scheduler.preemptions,
            finished=dict(self._finished),
            **{name: self._counts[name] for name in (*names, "media_computed", "media_cached")},
        )

    def check(self) -> None:
        """Raises AssertionError if a page of the cache is lost, or shared by mistake. For tests."""
        self._pool.check([request.pages for request in self._live.values()])


def _num_pages(model: ErnieModel, settings: EngineSettings) -> int:
    page_bytes = Runner.page_bytes(model.config, model.activation_dtype, settings.page_tokens)
    num_pages = int(settings.cache_gib * 2**30 / page_bytes)
    if num_pages < 1:
        raise ValueError(
            f"engine.cache_gib is {settings.cache_gib:g}, which holds no page of {settings.page_tokens} tokens "
            f"({page_bytes / 2**30:.2g} GiB); raise it, or lower engine.page_tokens."
        )
    return num_pages


def _max_context(config: ErnieConfig, settings: EngineSettings, num_pages: int) -> tuple[int, str]:
    """Tokens, and which setting limits them."""
    longest = config.max_position_embeddings
    if settings.max_context is not None and settings.max_context > longest:
        raise ValueError(
            f"engine.max_context is {settings.max_context}; the checkpoint was made for {longest} "
            "(max_position_embeddings), so it can be at most that."
        )
    # The last sampled token is never computed, so it needs no place in the cache.
    places = num_pages * settings.page_tokens + 1
    if places < (settings.max_context or longest):
        return places, f"engine.cache_gib={settings.cache_gib:g}"
    if settings.max_context is not None:
        return settings.max_context, f"engine.max_context={settings.max_context}"
    return longest, "the checkpoint (max_position_embeddings)"


def _touched(request: Request, count: int) -> list[Span]:
    """Images and videos that have placeholders among the next `count` tokens."""
    start, stop = request.computed, request.computed + count
    if not request.spans or request.spans[-1].stop <= start:
        return []
    return [span for span in request.spans if span.start < stop and start < span.stop]


def _sample_alone(logit_1V: Tensor, request: Request) -> Sampled:
    try:
        return sample(logit_1V.clone(), [request.sampler])[0]
    except Exception as error:
        return Sampled(-1, 0.0, error=said(error))


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
