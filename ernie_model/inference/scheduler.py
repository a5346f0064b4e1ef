"""What is computed in the next step: which requests, how many tokens of each, and into which pages of the cache.

    waiting  ──admit──►  running  ──done──►            order of arrival, in both; everyone in `running` came before
       ▲                    │                          everyone in `waiting`
       └─────preempt────────┘  the latest, when pages run out: it keeps its tokens and computes them again

A request is a list of known tokens, of which the first `computed` are in the cache. Most steps compute one more, the
token that was sampled last; a prompt is computed in chunks. Both are the same thing here: `tokens[computed:]` is what
is left, and when nothing is left a token is sampled.

Why nobody waits for ever: the first in `running` may take the pages of all others, who came later, and a request that
would not fit into an empty cache is refused at the door. So the first one always goes on, until it is done.

Who has the same beginning as an earlier request that is about to compute it waits for those pages and shares them, so
attempts of one prompt that arrive together compute it once. Only full pages are shared, and the last token of a request
is always computed, because its logits are needed.

Shape letters:  T tokens
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ernie_model.inference.pages import START, PagePool, page_name
from ernie_model.inference.request import MediaItem


@dataclass(frozen=True)
class Span:
    """Placeholders [start, stop) of one image or video."""

    start: int
    stop: int
    item: MediaItem


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it."""

    id: int
    tokens: list[int]
    """All that are known: the prompt's, then the sampled ones."""
    spans: Sequence[Span] = ()
    experts: bool = False
    """Which experts its tokens visit is to be known."""
    all_logits: bool = False
    """Those of every token of the prompt are wanted, so that none of it may be taken from the cache."""
    num_prompt: int = field(init=False)

    # what is in the cache
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    names: list[bytes] = field(default_factory=list)
    """Of all full pages of the known tokens."""
    cached: int = 0
    """Tokens of the prompt that were found there when it was first computed."""
    prompt_done: bool = False
    """The whole prompt has been computed once."""
    running: bool = False
    expected: int = 0
    """Pages that an earlier request is about to compute for this one."""

    def __post_init__(self):
        self.num_prompt = len(self.tokens)

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def wants_all_logits(self) -> bool:
        return self.all_logits and not self.prompt_done


class Scheduler:
    """
    Args:
        step_tokens: at most so many tokens are computed in one step.
        step_logits: at most so many tokens of prompts whose logits are all wanted: a row of them is large.
        max_running: requests that are computed at a time; no more than `step_tokens`, so that each gets its token.
        share: find pages by what they hold.
    """

    def __init__(
        self, pool: PagePool, *, step_tokens: int, max_running: int, step_logits: int = 512, share: bool = True
    ):
        self.pool = pool
        self.step_tokens = step_tokens
        self.step_logits = step_logits
        self.max_running = min(max_running, step_tokens)
        self.share = share
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.preemptions = 0  # for want of room

    # -------------------------------------------------------------------------------------------------- come and go

    def add(self, job: Job) -> None:
        self._name_pages(job)
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """It is done, or given up: its pages are free, and what they hold may be found by others."""
        (self.running if job.running else self.waiting).remove(job)
        self._release(job)

    def append(self, job: Job, token_id: int) -> None:
        """A token was sampled."""
        job.tokens.append(token_id)
        self._name_pages(job)

    def preempt_all(self) -> None:
        """Everything is computed anew: what is in the cache has become wrong."""
        while self.running:
            self._preempt(self.running[-1])
        self.pool.forget_all()

    def _name_pages(self, job: Job) -> None:
        if not self.share:
            return
        size = self.pool.page_tokens
        while (stop := (len(job.names) + 1) * size) <= len(job.tokens):
            start = stop - size
            media = [span.item for span in job.spans if span.start < stop and start < span.stop]
            before = job.names[-1] if job.names else START
            job.names.append(page_name(before, job.tokens[start:stop], media))

    def _release(self, job: Job) -> None:
        self.pool.release(job.pages)
        job.pages, job.computed, job.running, job.expected = [], 0, False, 0
        job.cached = job.cached if job.prompt_done else 0

    def _preempt(self, job: Job) -> None:
        assert job is self.running[-1]
        self.running.pop()
        self._release(job)
        self.waiting.appendleft(job)

    # -------------------------------------------------------------------------------------------------------- a step

    def schedule(self) -> dict[Job, int]:
        """How many tokens of which requests are computed now; their pages are there. Not empty while there is any
        request."""
        self._admit()
        for job in self.running:
            self._adopt(job)
        plan: dict[Job, int] = {}
        # Answers first: whoever is being answered does not wait for somebody's long prompt.
        for job in list(self.running):
            if job.running and job.left == 1 and not job.expected:
                self._plan(plan, job, 1)
        prompts = [job for job in self.running if job.left > 1 and not job.expected]
        # Of what is left, half for the prompt that came first, so that it gets on whoever comes after; the rest for
        # those that need least, so that a short one does not wait for a long one.
        for first, job in [(True, job) for job in prompts[:1]] + [(False, job) for job in sorted(prompts, key=_left)]:
            room = self.step_tokens - sum(plan.values()) + plan.get(job, 0)
            if job.running and room > 0:
                self._plan(plan, job, -(-room // 2) if first else room)
        return plan

    def _plan(self, plan: dict[Job, int], job: Job, room: int) -> None:
        if job.wants_all_logits:
            others = sum(n for other, n in plan.items() if other.wants_all_logits and other is not job)
            room = min(room, self.step_logits - others)
        count = self._make_room(job, min(job.left, room), plan) if room > 0 else 0
        if count:
            plan[job] = count

    def advance(self, job: Job, count: int) -> None:
        """`count` tokens have been computed, and their pages can be found from now on."""
        size = self.pool.page_tokens
        before, job.computed = job.computed, job.computed + count
        job.prompt_done = job.prompt_done or job.computed >= job.num_prompt
        if self.share:
            for index in range(before // size, job.computed // size):
                self.pool.name(job.pages[index], job.names[index])

    def _admit(self) -> None:
        """Take in who waits, in order, as long as there is room for what they have to compute and for one more page of
        everyone who runs. Whoever comes first when nobody runs is taken in at once."""
        promised = sum(self._missing(job) - job.expected for job in self.running)
        while self.waiting and len(self.running) < self.max_running:
            job = self.waiting[0]
            found, unused = self._find(job)
            expected = self._expected(job, found)
            need = self._missing(job) - found - expected
            if self.running and promised + need + unused + len(self.running) + 1 > self.pool.num_free:
                break
            self.waiting.popleft()
            job.running = True
            self.running.append(job)
            self._adopt(job)
            promised += need

    def _missing(self, job: Job) -> int:
        """Pages that its known tokens need beside those it has."""
        return -(-len(job.tokens) // self.pool.page_tokens) - len(job.pages)

    def _shareable(self, job: Job) -> int:
        """Its first so many pages may be somebody else's work."""
        if not self.share or job.wants_all_logits:
            return 0
        return (len(job.tokens) - 1) // self.pool.page_tokens

    def _find(self, job: Job) -> tuple[int, int]:
        """How many of its pages from the first on are there, and how many of those nobody uses."""
        found = unused = 0
        for name in job.names[: self._shareable(job)]:
            page = self.pool.find(name, experts=job.experts)
            if page is None:
                break
            found += 1
            unused += not self.pool.is_used(page)
        return found, unused

    def _adopt(self, job: Job) -> None:
        """Take the next pages from the cache where they are there, and see how many are on their way."""
        size, limit = self.pool.page_tokens, self._shareable(job)
        job.expected = 0
        if job.computed % size or job.computed // size >= limit:
            return
        while (index := job.computed // size) < limit:
            page = self.pool.find(job.names[index], experts=job.experts)
            if page is None:
                job.expected = self._expected(job, index)
                return
            self.pool.share(page)
            self.pool.release(job.pages[index:])  # of a step that failed
            del job.pages[index:]
            job.pages.append(page)
            job.computed += size
            job.cached += 0 if job.prompt_done else size

    def _expected(self, job: Job, index: int) -> int:
        """How many of its pages from `index` on an earlier request will have computed."""
        limit, most = self._shareable(job), 0
        for other in self.running:
            if other.id >= job.id:
                break
            if other.computed // self.pool.page_tokens > index or (job.experts and not other.experts):
                continue
            most = max(most, _common(job.names, other.names, index, limit) - index)
        return most

    def _make_room(self, job: Job, count: int, plan: dict[Job, int]) -> int:
        """Pages for the next `count` tokens, or for as many of them as there is room for.

        They are taken from whoever came later, if need be; never from an earlier one, who will be done by and by.
        """
        size = self.pool.page_tokens
        need = -(-(job.computed + count) // size) - len(job.pages)
        while self.pool.num_free < need and self.running[-1] is not job:
            last = self.running[-1]
            plan.pop(last, None)
            self._preempt(last)
            self.preemptions += 1
        job.pages += [self.pool.take() for _ in range(min(need, self.pool.num_free))]
        return min(count, len(job.pages) * size - job.computed)


def _left(job: Job) -> int:
    return job.left


def _common(mine: Sequence[bytes], theirs: Sequence[bytes], index: int, limit: int) -> int:
    """Up to where, from `index` on and to `limit` at most, the two have the same names; a name stands for all before
    it, so it can be searched for by halves."""
    return bisect_left(range(index, min(limit, len(theirs))), True, key=lambda i: mine[i] != theirs[i]) + index
