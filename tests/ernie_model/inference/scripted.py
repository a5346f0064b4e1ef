"""An engine whose answers are written beforehand: what agent, evaluation and server do with them, without a model."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from ernie_model.inference.detokenize import Detokenizer
from ernie_model.inference.request import Completion, Delta, Finish, Prompt, SamplingParams
from ernie_model.tokenizer import END_OF_SENTENCE, Tokenizer


class ScriptedEngine:
    """A `Generates`. `replies`: the text of the next answer for each prompt, or texts to be given in order."""

    max_context = 10**6

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
            end = self.tokenizer.require(END_OF_SENTENCE)
            detokenizer = Detokenizer(self.tokenizer, params.stop, {end, *params.stop_ids})
            sampled: list[int] = []
            for token_id in [*self.tokenizer.encode_markup(self.reply(prompt)), end]:
                await asyncio.sleep(self.pause_s)
                sampled.append(token_id)
                text, completion = detokenizer.push(token_id), None
                if detokenizer.stopped is not None or len(sampled) == params.max_new_tokens:
                    text += detokenizer.finish()
                    completion = Completion(
                        token_ids=tuple(sampled),
                        text=detokenizer.text,
                        finish=Finish.LENGTH if detokenizer.stopped is None else Finish.STOP,
                        logprobs=(-0.5,) * len(sampled),
                        versions=(0,) * len(sampled),
                        stop=detokenizer.stopped,
                        num_prompt_tokens=len(prompt.token_ids),
                    )
                yield Delta(text, (token_id,), (-0.5,), completion=completion)
                if completion is not None:
                    return
        finally:
            self.running -= 1
