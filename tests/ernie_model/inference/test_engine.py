"""The engine over a runner whose logits are a hash of what the pages hold (fake_runner.py)."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_model.config import PositionAfterVideo
from ernie_model.inference.request import (
    Completion,
    EngineFull,
    Finish,
    MediaItem,
    Prompt,
    RequestError,
    SamplingParams,
)
from ernie_model.inference.sampling import Vocabulary
from tests.ernie_model.inference.fake_runner import (
    expected_chain,
    fake_experts,
    fake_logits,
    greedy_token,
    make_engine,
)

GREEDY = SamplingParams(temperature=0, max_new_tokens=5, ignore_end=True)


def text(seed: int, length: int) -> Prompt:
    return Prompt(tuple(torch.randint(300, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()))


def picture(config, seed: int, grid=(1, 4, 6)) -> tuple[tuple[int, ...], MediaItem]:
    """Ids of one image or video with its start and end, and the item."""
    frames, rows, columns = grid
    count = max(frames // 2, 1) * rows // 2 * columns // 2
    generator = torch.Generator().manual_seed(seed)
    item = MediaItem(grid, torch.randn(frames * rows * columns, config.vision.patch_dim, generator=generator))
    if frames == 1:
        return (config.image_start_token_id, *[config.image_token_id] * count, config.image_end_token_id), item
    return (config.video_start_token_id, *[config.video_token_id] * count, config.video_end_token_id), item


def with_pictures(config, *seeds: int, grid=(1, 4, 6)) -> Prompt:
    """Three tokens of text, then pictures with two tokens behind each."""
    prompt = text(99, 3)
    for seed in seeds:
        ids, item = picture(config, seed, grid)
        prompt = prompt.extended((*ids, 400 + seed, 401), [item])
    return prompt


class Check:
    """Compares completions with what the definition says."""

    def __init__(self, config, tokenizer):
        self.config = config
        self.vocabulary = Vocabulary(tokenizer, config.vocab_size)

    def __call__(self, prompt: Prompt, completion: Completion) -> None:
        """Each token is the greedy one after all before it, in a forward pass with the weights that it names."""
        answer = completion.token_ids
        assert len(completion.versions) == len(completion.logprobs) == len(answer)
        chains = {v: expected_chain(self.config, prompt, answer, v) for v in set(completion.versions)}
        first = len(prompt.token_ids) - 1
        for number, (token, version) in enumerate(zip(answer, completion.versions, strict=True)):
            assert token == greedy_token(self.config, chains[version][first + number], self.vocabulary)
        assert list(completion.versions) == sorted(completion.versions)
        assert completion.num_prompt_tokens == len(prompt.token_ids)
        if completion.experts is not None:
            self._experts(prompt, completion, chains)

    def _experts(self, prompt, completion, chains) -> None:
        """Of a place are those that led to the token sampled behind it."""
        assert completion.experts is not None
        count, first = len(prompt.token_ids) + len(completion.token_ids), len(prompt.token_ids) - 1
        assert completion.experts.shape == (count, 1, 2) and completion.experts.dtype == torch.int16
        assert (completion.experts[-1] == -1).all()
        if completion.versions:
            of = [completion.versions[max(0, place - first)] for place in range(count - 1)]
            wanted = fake_experts([chains[version][place] for place, version in enumerate(of)])
            assert torch.equal(completion.experts[:-1], wanted)


@pytest.fixture
def check(vl_config, tokenizer) -> Check:
    return Check(vl_config, tokenizer)


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("step_tokens", [1, 3, 7, 2048])
@pytest.mark.parametrize("share", [True, False])
def test_prompts_of_all_kinds_in_chunks(vl_config, tokenizer, check, step_tokens, share):
    engine, runner = make_engine(vl_config, tokenizer, step_tokens=step_tokens, share_prefixes=share, num_pages=200)
    prompts = [
        text(1, 1),
        text(2, 4),
        text(3, 30),
        with_pictures(vl_config, 1),
        with_pictures(vl_config, 1, 2, 1),
        with_pictures(vl_config, 5, grid=(8, 4, 4)),
        with_pictures(vl_config, 1),
    ]
    for prompt, completion in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        check(prompt, completion)
        assert completion.finish is Finish.LENGTH and len(completion.token_ids) == 5
    assert max(sum(len(row.token_ids) for row in step) for step in runner.steps) <= step_tokens
    engine.check()
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("rule", PositionAfterVideo)
def test_text_goes_on_behind_a_long_video_by_either_rule(vl_config, tokenizer, rule):
    config = dataclasses.replace(vl_config, position_after_video=rule)
    engine, _ = make_engine(config, tokenizer)
    prompt = with_pictures(config, 1, grid=(12, 4, 4))
    at_once = Prompt(prompt.token_ids[:-3], prompt.media)  # ends with the placeholders
    for each in (prompt, at_once):
        Check(config, tokenizer)(each, engine.generate([each], GREEDY)[0])


def test_attempts_of_one_prompt_compute_it_once(vl_config, tokenizer, check):
    engine, runner = make_engine(vl_config, tokenizer)
    prompt = with_pictures(vl_config, 1, 2)  # 23 tokens: 5 pages and 3 tokens
    for prompt_completion in engine.generate([prompt] * 8, GREEDY):
        check(prompt, prompt_completion)
    assert runner.computed == 23 + 7 * 3 + 8 * 4
    assert runner.media == 2
    assert engine.stats().cached_tokens == 7 * 20


def test_a_conversation_goes_on_where_it_was(vl_config, tokenizer, check):
    """Pages that the answer filled are shared as well, and a new image is added in a later turn."""
    engine, runner = make_engine(vl_config, tokenizer)
    prompt = with_pictures(vl_config, 1)
    for turn in range(2, 5):
        before = len(prompt.token_ids)
        (completion,) = engine.generate([prompt], GREEDY)
        check(prompt, completion)
        ids, item = picture(vl_config, turn)
        prompt = prompt.extended((*completion.token_ids, 500, *ids, 501), [item])
        runner.computed = 0
        (completion,) = engine.generate([prompt], GREEDY)
        check(prompt, completion)
        # the last sampled token was never computed; of what was, all but the rest behind the last full page is found
        assert completion.num_cached_tokens == (before + len(completion.token_ids) - 1) // 4 * 4
        assert runner.computed == len(prompt.token_ids) - completion.num_cached_tokens + 4


def test_a_prefix_may_end_inside_an_image(vl_config, tokenizer, check):
    """With another image behind the first, and with another text behind the same image."""
    engine, runner = make_engine(vl_config, tokenizer, media_cache_mib=0)
    ids, item = picture(vl_config, 1, grid=(1, 8, 8))  # 16 placeholders at 4..19
    first = text(1, 3).extended((*ids, 400), [item])
    second = text(1, 3).extended((*ids, *range(401, 409)), [item])
    check(first, engine.generate([first], GREEDY)[0])
    cut = Prompt(first.token_ids[:10], (MediaItem((1, 4, 6), torch.zeros(24, vl_config.vision.patch_dim)),))
    check(cut, engine.generate([cut], GREEDY)[0])
    (completion,) = engine.generate([second], GREEDY)
    check(second, completion)
    assert completion.num_cached_tokens == 20


@pytest.mark.parametrize("change", ["pixels", "grid"])
def test_another_picture_is_never_taken_for_the_same(vl_config, tokenizer, check, change):
    engine, _ = make_engine(vl_config, tokenizer)
    ids, _ = picture(vl_config, 1, grid=(1, 4, 6))
    patches = torch.ones(24, vl_config.vision.patch_dim)
    other = MediaItem((1, 6, 4), patches) if change == "grid" else MediaItem((1, 4, 6), patches * 2)
    for item in (MediaItem((1, 4, 6), patches), other):
        prompt = text(1, 3).extended((*ids, 400), [item])
        (completion,) = engine.generate([prompt], GREEDY)
        check(prompt, completion)
        assert completion.num_cached_tokens == (0 if item is not other else 4)  # the text and the start token


def test_old_pages_give_way_and_new_ones_are_found(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer, num_pages=10)
    prompts = [text(seed, 17) for seed in range(4)]  # 4 full pages each
    for prompt in prompts:
        check(prompt, engine.generate([prompt], GREEDY)[0])
    found = [engine.generate([prompt], GREEDY)[0].num_cached_tokens for prompt in (prompts[3], prompts[0])]
    assert found == [16, 0]
    engine.check()


def test_what_a_failed_request_computed_is_not_shared(vl_config, tokenizer, check):
    engine, runner = make_engine(vl_config, tokenizer)
    bad, good = text(1, 12), text(2, 12)
    runner.poison = bad.token_ids[5]
    failed, completion = engine.generate([bad, good], GREEDY)
    assert failed.finish is Finish.ERROR and "not finite" in (failed.error or "") and failed.token_ids == ()
    check(good, completion)
    runner.poison = None
    (completion,) = engine.generate([bad], GREEDY)
    check(bad, completion)
    assert completion.num_cached_tokens == 0


def test_a_picture_that_cannot_be_computed_fails_alone(vl_config, tokenizer, check):
    engine, runner = make_engine(vl_config, tokenizer)
    prompts = [with_pictures(vl_config, 1), with_pictures(vl_config, 2), text(1, 9)]
    runner.bad_media = prompts[0].media[0].digest
    failed, *others = engine.generate(prompts, GREEDY)
    assert failed.finish is Finish.ERROR and "no picture" in (failed.error or "")
    for prompt, completion in zip(prompts[1:], others, strict=True):
        check(prompt, completion)
    engine.check()


@pytest.mark.parametrize("where", ["sample", "accept"])
def test_a_sampler_that_raises_fails_alone(vl_config, tokenizer, check, where, monkeypatch):
    engine, _ = make_engine(vl_config, tokenizer)
    prompts = [text(seed, 9) for seed in range(3)]
    params = [GREEDY, dataclasses.replace(GREEDY, temperature=1.0, seed=1), GREEDY]
    requests = [engine.prepare(*pair) for pair in zip(prompts, params, strict=True)]

    def broken(*arguments):
        raise ArithmeticError("broken")

    monkeypatch.setattr(requests[1].sampler, "uniform" if where == "sample" else "accept", broken)
    for request in requests:
        engine.enqueue(request)
    done = run(engine)
    assert done[1].finish is Finish.ERROR and done[1].error == "ArithmeticError: broken"
    check(prompts[0], done[0])
    check(prompts[2], done[2])
    engine.check()


def run(engine) -> dict[int, Completion]:
    done = {}
    while engine.has_work:
        for request_id, delta in engine.step():
            if delta.completion is not None:
                done[request_id] = delta.completion
    return done


# ------------------------------------------------------------------------------------------------------------ endings


def test_a_stop_id_a_stop_text_and_a_terminator_end_an_answer(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer)
    prompt = text(5, 9)
    (plain,) = engine.generate([prompt], dataclasses.replace(GREEDY, max_new_tokens=12))
    by_id = dataclasses.replace(GREEDY, max_new_tokens=12, stop_ids=(plain.token_ids[4],))
    word = tokenizer.decode(plain.token_ids[6:7])
    by_text = dataclasses.replace(GREEDY, max_new_tokens=12, stop=(word,))
    one, two = engine.generate([prompt] * 2, [by_id, by_text])
    assert one.token_ids == plain.token_ids[:5] and one.stop == plain.token_ids[4] and one.finish is Finish.STOP
    assert one.text == tokenizer.decode(plain.token_ids[:4])
    assert two.finish is Finish.STOP and two.stop == word and two.text == plain.text[: plain.text.index(word)]
    for end in engine._entry.vocabulary.terminators:
        biased = SamplingParams(temperature=0, logit_bias={end: 100.0}, max_new_tokens=5)
        (ended,) = engine.generate([prompt], biased)
        assert (ended.token_ids, ended.text, ended.finish, ended.stop) == ((end,), "", Finish.STOP, end)
        (goes_on,) = engine.generate([prompt], dataclasses.replace(biased, ignore_end=True, max_new_tokens=3))
        assert goes_on.token_ids == (end,) * 3 and goes_on.finish is Finish.LENGTH


def test_what_the_model_takes_for_a_picture_is_never_sampled(vl_config, tokenizer):
    """Whatever the tokenizer calls it: a placeholder in an answer would ask for pixels that are not there."""
    config = dataclasses.replace(vl_config, image_token_id=400, image_start_token_id=401, video_end_token_id=402)
    engine, _ = make_engine(config, tokenizer)
    wished = SamplingParams(temperature=0, max_new_tokens=3, logit_bias={400: 90, 401: 90, 402: 90})
    assert not {400, 401, 402} & set(engine.generate([text(1, 9)], wished)[0].token_ids)


def test_deltas_put_together_are_the_completion(vl_config, tokenizer):
    engine, _ = make_engine(vl_config, tokenizer)
    params = dataclasses.replace(GREEDY, max_new_tokens=20, top_logprobs=3, stop=("never to be seen",))
    deltas = list(engine.stream(text(1, 9), params))
    completion = deltas[-1].completion
    assert completion is not None and all(delta.completion is None for delta in deltas[:-1])
    assert "".join(delta.text for delta in deltas) == completion.text != ""
    assert sum((delta.token_ids for delta in deltas), ()) == completion.token_ids
    assert sum((delta.logprobs for delta in deltas), ()) == completion.logprobs
    assert sum((delta.top_logprobs for delta in deltas), ()) == completion.top_logprobs
    assert [top.token_ids[0] for top in completion.top_logprobs] == list(completion.token_ids)
    assert [len(top.token_ids) for top in completion.top_logprobs] == [3] * 20


def test_time_out_and_cancel_keep_what_was_written(vl_config, tokenizer, check):
    now = 0.0
    engine, _ = make_engine(vl_config, tokenizer, clock=lambda: now)
    params = dataclasses.replace(GREEDY, max_new_tokens=50)
    prompts = [text(seed, 9) for seed in range(4)]
    late, given_up, unseen = engine.add(prompts[0], params, timeout_s=10), engine.add(prompts[1], params), []
    for _ in range(4):
        engine.step()
    engine.cancel(given_up)
    engine.cancel(engine.add(prompts[2], params))
    engine.cancel(12345)
    unseen.append(engine.add(prompts[3], params, timeout_s=0))
    now = 10.0
    done = run(engine)
    assert [done[i].finish for i in range(4)] == [Finish.TIMEOUT, Finish.CANCELLED, Finish.CANCELLED, Finish.TIMEOUT]
    assert [len(done[i].token_ids) for i in range(4)] == [4, 4, 0, 0]
    for number in range(4):
        check(prompts[number], done[number])
    assert late == 0 and unseen == [3]
    engine.check()
    assert engine.stats().pages_used == 0


def test_leaving_a_stream_cancels_its_request_and_leaves_others(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer)
    other = engine.add(text(2, 9), dataclasses.replace(GREEDY, max_new_tokens=9))
    for number, _ in enumerate(engine.stream(text(1, 9), dataclasses.replace(GREEDY, max_new_tokens=50))):
        if number == 3:
            break
    assert engine.stats().running == 1 and engine.stats().finished == {Finish.CANCELLED: 1}
    inner = list(engine.stream(text(3, 9), GREEDY))[-1].completion
    assert inner is not None
    check(text(3, 9), inner)
    deltas = [delta for request_id, delta in itertools.chain(*iter(engine.step, [])) if request_id == other]
    assert sum((delta.token_ids for delta in deltas), ()) == deltas[-1].completion.token_ids
    check(text(2, 9), deltas[-1].completion)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: Prompt(()), "empty"),
        (lambda config: Prompt((5, config.vocab_size)), "token 2048"),
        (lambda config: text(1, 80), r"80 tokens with max_new_tokens=5 is more than the 81 .*cache_gib.* at most 1"),
        (lambda config: text(1, 90), "shorten the prompt"),
        (lambda config: Prompt((5, config.image_token_id)), "placeholders do not fit"),
        (lambda config: Prompt((5, 6), with_pictures(config, 1).media), "placeholders do not fit"),
        (lambda config: Prompt(with_pictures(config, 1).token_ids, (MediaItem((1, 4, 6), torch.zeros(9, 588)),)), "24"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_runs(vl_config, tokenizer, change, message):
    assert vl_config.vocab_size == 2048
    engine, runner = make_engine(vl_config, tokenizer, num_pages=20)
    with pytest.raises(RequestError, match=message):
        engine.generate([text(1, 9), change(vl_config)], GREEDY)
    assert not engine.has_work and not runner.steps


def test_the_longest_request_that_is_taken_runs_to_its_end(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer, num_pages=20)
    prompt, params = text(1, 60), dataclasses.replace(GREEDY, max_new_tokens=21)
    check(prompt, engine.generate([prompt], params)[0])
    with pytest.raises(RequestError):
        engine.add(prompt, dataclasses.replace(params, max_new_tokens=22))


def test_settings_that_no_model_can_have(vl_config, tokenizer):
    with pytest.raises(ValueError, match="engine.cache_gib"):
        make_engine(vl_config, tokenizer, num_pages=0)
    with pytest.raises(ValueError, match="engine.max_context is 200000"):
        make_engine(vl_config, tokenizer, max_context=200000)


def test_a_full_engine_says_so(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer, max_running=2, max_waiting=1)
    for seed in range(3):
        engine.add(text(seed, 5), GREEDY)
    with pytest.raises(EngineFull, match="3 requests"):
        engine.add(text(4, 5), GREEDY)
    assert len(run(engine)) == 3
    prompts = [text(seed, 5) for seed in range(9)]  # `generate` waits for room instead
    for prompt, completion in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        check(prompt, completion)


# ---------------------------------------------------------------------------------------------------------- more to ask


@pytest.mark.parametrize("step_tokens", [5, 2048])
def test_log_probs_of_the_prompt_whatever_is_cached(vl_config, tokenizer, step_tokens):
    engine, _ = make_engine(vl_config, tokenizer, step_tokens=step_tokens)
    prompt = with_pictures(vl_config, 1)
    engine.generate([prompt], GREEDY)
    (completion,) = engine.generate([prompt], dataclasses.replace(GREEDY, prompt_logprobs=True))
    chain = expected_chain(vl_config, prompt)
    rows = torch.stack([fake_logits(state, vl_config.vocab_size).log_softmax(-1) for state in chain[:-1]])
    wanted = rows.gather(1, torch.tensor(prompt.token_ids[1:])[:, None])[:, 0]
    assert completion.prompt_logprobs[0] is None and completion.num_cached_tokens == 0
    torch.testing.assert_close(torch.tensor(completion.prompt_logprobs[1:]), wanted)


def test_logits_of_prompts_are_limited_in_a_step(vl_config, tokenizer):
    engine, runner = make_engine(vl_config, tokenizer, num_pages=2000)
    params = dataclasses.replace(GREEDY, prompt_logprobs=True)
    done = engine.generate([text(seed, 700) for seed in range(2)], params)
    assert [len(completion.prompt_logprobs) for completion in done] == [700, 700]
    assert max(sum(row.num_logits for row in step) for step in runner.steps) <= 512 + 2


def test_experts_of_tokens_that_came_from_the_cache(vl_config, tokenizer, check):
    engine, runner = make_engine(vl_config, tokenizer)
    prompt, params = text(1, 13), dataclasses.replace(GREEDY, routed_experts=True)
    (without,) = engine.generate([prompt], GREEDY)  # its pages do not know their experts
    (first,) = engine.generate([prompt], params)
    (second,) = engine.generate([prompt], params)
    assert [without.num_cached_tokens, first.num_cached_tokens, second.num_cached_tokens] == [0, 0, 12]
    assert without.experts is None
    for completion in (first, second):
        assert completion.experts is not None
        check(prompt, completion)
    engine.check()


def test_new_weights_compute_everything_anew(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer)
    prompts = [with_pictures(vl_config, 1), text(2, 40)]
    params = dataclasses.replace(GREEDY, max_new_tokens=9, routed_experts=True, prompt_logprobs=True)
    ids = [engine.add(prompt, params) for prompt in prompts]
    for _ in range(3):
        engine.step()
    engine.weights_changed()
    engine.check()
    assert engine.stats().pages_used == 0 and engine.stats().preemptions == 0
    done = run(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        check(prompt, done[request_id])
        assert done[request_id].versions == (0,) * 3 + (1,) * 6
    (again,) = engine.generate(prompts[:1], GREEDY)
    check(prompts[0], again)
    assert set(again.versions) == {1} and again.num_cached_tokens > 0


def test_new_weights_in_the_middle_of_a_prompt(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer, step_tokens=8)  # the first step ends inside an image
    prompt = with_pictures(vl_config, 1, 2)
    request_id = engine.add(prompt, dataclasses.replace(GREEDY, routed_experts=True, prompt_logprobs=True))
    engine.step()
    engine.weights_changed()
    completion = run(engine)[request_id]
    check(prompt, completion)
    chain = expected_chain(vl_config, prompt, version=1)
    row = fake_logits(chain[0], vl_config.vocab_size).log_softmax(-1)
    assert completion.prompt_logprobs[1] == pytest.approx(float(row[prompt.token_ids[1]]), rel=1e-5)


# ------------------------------------------------------------------------------------------------- little room, any mix


def test_preempted_requests_go_on_as_if_nothing_had_been(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer, num_pages=12)
    prompts = [text(seed, 9) for seed in range(5)] + [with_pictures(vl_config, 1)]
    params = dataclasses.replace(GREEDY, max_new_tokens=24, routed_experts=True)
    for prompt, completion in zip(prompts, engine.generate(prompts, params), strict=True):
        check(prompt, completion)
    assert engine.stats().preemptions > 0
    engine.check()


def test_a_prompt_whose_log_probs_are_asked_for_loses_its_pages(vl_config, tokenizer, check):
    engine, _ = make_engine(vl_config, tokenizer, num_pages=10, step_tokens=2)
    first = engine.add(text(1, 4), dataclasses.replace(GREEDY, max_new_tokens=35))
    engine.step()
    prompt = text(2, 26)
    second = engine.add(prompt, dataclasses.replace(GREEDY, prompt_logprobs=True))
    done = run(engine)
    assert engine.stats().preemptions == 1 and engine.stats().sampled_tokens == 40
    check(text(1, 4), done[first])
    check(prompt, done[second])
    chain = expected_chain(vl_config, prompt)
    rows = torch.stack([fake_logits(state, vl_config.vocab_size).log_softmax(-1) for state in chain[:-1]])
    wanted = rows.gather(1, torch.tensor(prompt.token_ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done[second].prompt_logprobs[1:]), wanted)


@pytest.mark.parametrize("num_pages", [13, 14])
@pytest.mark.parametrize("length", [3, 4])
def test_a_long_prompt_takes_the_pages_of_a_later_answer(vl_config, tokenizer, check, length, num_pages):
    """The two begin pages in different steps, so that the answer has its place in the step already."""
    engine, _ = make_engine(vl_config, tokenizer, num_pages=num_pages, step_tokens=2)
    first = engine.add(text(1, 36), GREEDY)
    engine.step()
    second = engine.add(text(2, length), dataclasses.replace(GREEDY, max_new_tokens=40))
    done = run(engine)
    check(text(1, 36), done[first])
    check(text(2, length), done[second])
    assert engine.stats().preemptions > 0


def test_who_wants_experts_does_not_wait_for_who_does_not(vl_config, tokenizer):
    engine, runner = make_engine(vl_config, tokenizer)
    engine.generate([text(1, 13)] * 3, [GREEDY, *[dataclasses.replace(GREEDY, routed_experts=True)] * 2])
    assert [row.experts for row in runner.steps[0]] == [False, True]


def test_a_short_prompt_does_not_wait_for_a_long_one(vl_config, tokenizer):
    engine, _ = make_engine(vl_config, tokenizer, num_pages=300, step_tokens=20)
    long, short = engine.add(text(1, 1000), GREEDY), engine.add(text(2, 10), GREEDY)
    written = [request_id for _ in range(10) for request_id, _ in engine.step()]
    assert set(written) == {short} and len(written) == 5
    assert set(run(engine)) == {long}


PREFIXES = [(0, 0), (7, 0), (16, 0), (7, 1), (7, 2), (16, 1)]
"""Tokens of a common text, and images behind it."""


@st.composite
def actions(draw):
    kinds = st.sampled_from(["add", "add", "add", "step", "step", "step", "step", "cancel", "wait", "weights", "fail"])
    steps = []
    for kind in draw(st.lists(kinds, min_size=5, max_size=40)):
        if kind == "add":
            prefix = draw(st.sampled_from(PREFIXES))
            own, new = draw(st.integers(1, 12)), draw(st.integers(1, 14))
            flags = draw(st.tuples(st.booleans(), st.booleans()))
            steps.append((kind, prefix, own, new, flags, draw(st.sampled_from([None, None, 3.0]))))
        else:
            steps.append((kind, draw(st.integers(0, 20))))
    return steps


@settings(max_examples=60)
@given(
    actions=actions(),
    num_pages=st.integers(14, 30),
    step_tokens=st.sampled_from([2, 5, 9, 64]),
    max_running=st.integers(1, 6),
    share=st.booleans(),
    page_tokens=st.sampled_from([1, 4]),
)
def test_any_mix_ends_with_all_pages_back(
    vl_config, tokenizer, actions, num_pages, step_tokens, max_running, share, page_tokens
):
    """Random requests with common beginnings, cancels, time-outs, new weights, failing steps; in a cache that is far
    too small."""
    now, check = 0.0, Check(vl_config, tokenizer)
    engine, runner = make_engine(
        vl_config,
        tokenizer,
        num_pages=num_pages * 4 // page_tokens,
        page_tokens=page_tokens,
        step_tokens=step_tokens,
        max_running=max_running,
        share_prefixes=share,
        media_cache_mib=0,
        clock=lambda: now,
    )
    prompts, streamed, done = {}, {}, {}

    def step():
        try:
            written = engine.step()
        except MemoryError:  # and is tried again
            written = []
        for request_id, delta in written:
            assert request_id not in done, "a delta after the last"
            streamed.setdefault(request_id, []).extend(delta.token_ids)
            if delta.completion is not None:
                done[request_id] = delta.completion
        engine.check()

    for action in actions:
        match action:
            case ("add", (common, images), own, new, (experts, logprobs), timeout):
                prompt = text(0, common)
                for seed in range(images):
                    ids, item = picture(vl_config, seed)
                    prompt = prompt.extended((*ids, 300), [item])
                prompt = prompt.extended(text(own, own).token_ids)
                params = SamplingParams(
                    temperature=0, max_new_tokens=new, routed_experts=experts, prompt_logprobs=logprobs, ignore_end=True
                )
                prompts[engine.add(prompt, params, timeout_s=timeout)] = prompt
            case ("cancel", number):
                engine.cancel(number)
            case ("wait", _):
                now += 1.0
            case ("weights", _):
                engine.weights_changed()
            case ("fail", _):
                runner.fails = 1
            case _:
                step()
    for _ in range(5000):
        if not engine.has_work:
            break
        step()
    assert done.keys() == prompts.keys(), "somebody waits for ever"
    for request_id, completion in done.items():
        check(prompts[request_id], completion)
        assert tuple(streamed[request_id]) == completion.token_ids
        if completion.finish is Finish.LENGTH:
            assert len(completion.prompt_logprobs) in (0, len(prompts[request_id].token_ids))
    stats = engine.stats()
    assert stats.pages_used == stats.running == stats.waiting == 0
    assert max((sum(len(row.token_ids) for row in rows) for rows in runner.steps), default=0) <= step_tokens
