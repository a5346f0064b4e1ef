"""What a request must be, and what of it is made before it runs.

Shape letters:  T tokens   M media tokens   D model width   L sparse layers   K experts per token
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie_model.config import ErnieConfig
from ernie_model.inference.detokenize import Detokenizer
from ernie_model.inference.features import Key
from ernie_model.inference.request import ContextExceeded, Prompt, RequestError, SamplingParams, TokenLogprobs
from ernie_model.inference.sampling import Sampler, Vocabulary
from ernie_model.inference.scheduler import Job, Span
from ernie_model.rope import num_media_tokens, position_ids
from ernie_model.tokenizer import Tokenizer


@dataclass(eq=False, kw_only=True)
class Request(Job):
    """A request and its answer so far."""

    params: SamplingParams
    sampler: Sampler
    detokenizer: Detokenizer
    position_3T: Tensor | None
    """Of the prompt; None without media, where they count from 0."""
    next_position: int
    """Of the first sampled token."""
    deadline: float | None
    features: dict[Key, Tensor] = field(default_factory=dict)
    """Of images and videos that are computed in part."""
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    tops: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    expert_parts: list[Tensor] = field(default_factory=list)
    num_recorded: int = 0
    """Tokens whose experts `expert_parts` tells."""

    @property
    def num_sampled(self) -> int:
        return len(self.tokens) - self.num_prompt

    def forget_what_old_weights_did(self) -> None:
        """Of the prompt, as long as nothing was sampled; what led to a sampled token stays as it was."""
        self.features.clear()
        if not self.num_sampled:
            self.prompt_done, self.cached = False, 0
            self.prompt_logprobs, self.expert_parts, self.num_recorded = [], [], 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What requests are measured by. Holds no state: threads may share it."""

    config: ErnieConfig
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    max_context: int
    limited_by: str
    """What sets `max_context`."""

    def request(self, prompt: Prompt, params: SamplingParams, deadline: float | None) -> Request:
        """
        Raises:
            RequestError: it cannot be honoured.
        """
        position_3T = self._check(prompt, params)
        sampler = Sampler(params, prompt.token_ids, self.vocabulary)
        ends = {*params.stop_ids, *(() if params.ignore_end else self.vocabulary.terminators)}
        spans = self._spans(prompt)
        for span in spans:
            _ = span.item.digest  # computed here rather than between two steps
        return Request(
            id=-1,  # until it joins the line
            tokens=list(prompt.token_ids),
            spans=spans,
            experts=params.routed_experts and bool(self.config.sparse_layers),
            all_logits=params.prompt_logprobs,
            params=params,
            sampler=sampler,
            detokenizer=Detokenizer(self.tokenizer, params.stop, ends),
            position_3T=None if position_3T is None else position_3T[:, :-1],
            next_position=len(prompt.token_ids) if position_3T is None else int(position_3T[0, -1]),
            deadline=deadline,
        )

    def _check(self, prompt: Prompt, params: SamplingParams) -> Tensor | None:
        """Positions of the prompt and one token more; None for a prompt without media."""
        ids, config = prompt.token_ids, self.config
        if not ids:
            raise RequestError("The prompt is empty; it needs a token at least.")
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < config.vocab_size)
            raise RequestError(f"The prompt holds token {wrong}; ids go from 0 to {config.vocab_size - 1}.")
        if len(ids) + params.max_new_tokens > self.max_context:
            raise ContextExceeded(self._too_long(len(ids), params.max_new_tokens))
        if prompt.media and config.vision is None:
            raise RequestError(f"The prompt comes with {len(prompt.media)} images or videos; this is a text model.")
        for number, item in enumerate(prompt.media, start=1):
            assert config.vision is not None
            frames, rows, columns = item.grid
            wanted = (frames * rows * columns, config.vision.patch_dim)
            if tuple(item.patch_PX.shape) != wanted:
                raise RequestError(
                    f"Image or video {number} has grid {item.grid}, which asks for patches of shape {wanted}, and "
                    f"brings {tuple(item.patch_PX.shape)}."
                )
        if not prompt.media and not set(config.placeholder_token_ids) & set(ids):
            return None
        text_id = next(i for i in range(config.vocab_size) if i not in config.placeholder_token_ids)
        try:
            return position_ids(torch.tensor([*ids, text_id]), [item.grid for item in prompt.media], config)
        except ValueError as error:
            raise RequestError(f"The prompt's placeholders do not fit its images and videos: {error}") from error

    def _too_long(self, num_prompt: int, max_new_tokens: int) -> str:
        most = self.max_context - num_prompt
        way_out = f"set max_new_tokens to at most {most}" if most > 0 else "shorten the prompt"
        return (
            f"A prompt of {num_prompt} tokens with max_new_tokens={max_new_tokens} is more than the {self.max_context} "
            f"tokens that {self.limited_by} allows: {way_out}."
        )

    def _spans(self, prompt: Prompt) -> list[Span]:
        if not prompt.media:
            return []
        placeholders = torch.tensor(self.config.placeholder_token_ids)
        places = torch.isin(torch.tensor(prompt.token_ids), placeholders).nonzero()[:, 0].tolist()
        spans, at = [], 0
        for item in prompt.media:
            count = num_media_tokens(item.grid)
            spans.append(Span(places[at], places[at] + count, item))
            at += count
        return spans
