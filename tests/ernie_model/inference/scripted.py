"""An engine whose answers are written beforehand: what agent, evaluation and server do with them, without a model."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from ernie_model.inference.request import Completion, Delta, Finish, Prompt, SamplingParams
from ernie_model.tokenizer import END_OF_SENTENCE, Tokenizer


class ScriptedEngine:
    """A `Generates`. `replies`: the text of the next answer for each prompt, or texts to be given in order."""

    def __init__(self, tokenizer: Tokenizer, replies: Callable[[Prompt], str] | Iterable[str], pause_s: float = 0.0):
        self.tokenizer = tokenizer
        if callable(replies):
            self.reply = replies
        else:
            queue = iter(replies)
            self.reply = lambda prompt: next(queue)
        self.pause_s = pause_s
        self.prompts: list[Prompt] = []
        self.running = 0

    async def generate(self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None) -> Completion:
        async for delta in self.stream(prompt, params, timeout_s=timeout_s):
            if delta.completion is not None:
                return delta.completion
        raise AssertionError("a stream ends with its completion")

    async def stream(
        self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None
    ) -> AsyncIterator[Delta]:
        self.prompts.append(prompt)
        self.running += 1
        try:
            ids = [*self.tokenizer.encode_markup(self.reply(prompt)), self.tokenizer.require(END_OF_SENTENCE)]
            finish = Finish.STOP if len(ids) <= params.max_new_tokens else Finish.LENGTH
            ids, shown = ids[: params.max_new_tokens], ""
            for number in range(1, len(ids) + 1):
                await asyncio.sleep(self.pause_s)
                last = number == len(ids)
                text = self.tokenizer.decode(ids[: number - 1] if last and finish is Finish.STOP else ids[:number])
                completion = None
                if last:
                    completion = Completion(
                        token_ids=tuple(ids),
                        text=text,
                        finish=finish,
                        logprobs=(-0.5,) * len(ids),
                        versions=(0,) * len(ids),
                        stop=ids[-1] if finish is Finish.STOP else None,
                        num_prompt_tokens=len(prompt.token_ids),
                    )
                yield Delta(text[len(shown) :], (ids[number - 1],), (-0.5,), completion=completion)
                shown = text
        finally:
            self.running -= 1
