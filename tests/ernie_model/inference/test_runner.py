"""Steps over the paged cache against one full forward, in float64: the two must be the same function."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ernie_model.config import ErnieConfig, PositionAfterVideo, VisionConfig
from ernie_model.context import Packed
from ernie_model.inference.kv_cache import KVCache, Span
from ernie_model.inference.request import MediaItem
from ernie_model.inference.runner import Row, Runner
from ernie_model.model import ErnieModel
from ernie_model.rope import position_ids

IMAGE, START, END, VIDEO, VIDEO_START, VIDEO_END = 10, 11, 12, 13, 14, 15
PAGE = 4


def config(**changes) -> ErnieConfig:
    fields = dict(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=24, num_experts=4, experts_per_token=2, text_expert_width=8, vision_expert_width=4,
        num_shared_experts=1, sparse_layers=(1, 2), mrope_section=(1, 1, 2),
        vision=VisionConfig(depth=1, hidden_size=8, num_heads=2, intermediate_size=16),
        image_token_id=IMAGE, image_start_token_id=START, image_end_token_id=END,
        video_token_id=VIDEO, video_start_token_id=VIDEO_START, video_end_token_id=VIDEO_END,
    )  # fmt: skip
    return ErnieConfig(**(fields | changes))


TEXT = dict(mrope_section=None, vision=None, vision_expert_width=0)


def build(dtype=torch.float64, **changes) -> ErnieModel:
    torch.manual_seed(0)
    model = ErnieModel(config(**changes)).set_dtype(dtype)
    with torch.no_grad():
        for p in model.parameters():  # at the initial 0.02, hardly anything but the embedding would show
            p.add_(0.3 * torch.randn_like(p))
    return model


class Conversation:
    """Ids with images and videos, and what one full forward says about them."""

    def __init__(self, model: ErnieModel, *parts: int | tuple[int, int, int], seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.token_ids, media = [1], []
        for part in parts:
            if isinstance(part, int):
                self.token_ids += torch.randint(20, 60, (part,), generator=generator).tolist()
                continue
            frames, rows, columns = part
            start, one, end = (START, IMAGE, END) if frames == 1 else (VIDEO_START, VIDEO, VIDEO_END)
            self.token_ids += [start, *[one] * (max(frames // 2, 1) * rows * columns // 4), end]
            media.append(MediaItem(part, torch.randn(frames * rows * columns, 588, generator=generator)))
        grids = [item.grid for item in media]
        self.media, token_T = media, torch.tensor(self.token_ids)
        self.position_3T = position_ids(token_T, grids, model.config)
        patch_PX = torch.cat([item.patch_PX for item in media]) if media else None
        context = Packed([len(token_T)])
        with torch.no_grad():
            out = model(token_T, self.position_3T, context, patch_PX=patch_PX, grids=grids, experts=True)
            self.logit_TV = F.linear(out.hidden_TD, model.head_VD)
        self.expert_LTK = out.expert_LTK

    def row(self, runner: Runner, start: int, end: int, pages: list[int], **options) -> Row:
        """Tokens start .. end, with the features of the placeholders among them."""
        features, seen = [], 0
        placeholders = [token in (IMAGE, VIDEO) for token in self.token_ids]
        for feature_MD in runner.media_features(self.media):
            mine = [t for t, is_media in enumerate(placeholders) if is_media][seen : seen + len(feature_MD)]
            seen += len(feature_MD)
            inside = [i for i, t in enumerate(mine) if start <= t < end]
            if inside:
                features.append(feature_MD[inside[0] : inside[-1] + 1])
        return Row(
            token_ids=self.token_ids[start:end], position_3T=self.position_3T[:, start:end], start=start,
            pages=pages, features=features, num_logits=end - start, **options,
        )  # fmt: skip

    def check(self, logit_TV, start: int, end: int, tolerance: float = 1e-9) -> None:
        torch.testing.assert_close(logit_TV, self.logit_TV[start:end], rtol=0, atol=tolerance)


def make_runner(model: ErnieModel, num_pages: int = 64) -> Runner:
    return Runner(model, num_pages=num_pages, page_tokens=PAGE, max_rows=16)


def pages_for(count: int, taken: set[int], choose: random.Random, num_pages: int = 64) -> list[int]:
    """Scattered over the cache, none of them taken."""
    pages = choose.sample(sorted(set(range(num_pages)) - taken), -(-count // PAGE))
    taken.update(pages)
    return pages


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes, parts",
    [
        (TEXT, (13, 9)),
        (TEXT | dict(sparse_layers=(), num_experts=0, experts_per_token=0, text_expert_width=0), (17,)),
        ({}, (5, (1, 4, 6), 3, (4, 4, 4), 6)),
        (dict(position_after_video=PositionAfterVideo.SPATIAL), (2, (12, 4, 4), 7, (1, 2, 2), 2)),
        (dict(position_after_video=PositionAfterVideo.LAST), (2, (12, 4, 4), 7, (1, 2, 2), 2)),
        (dict(num_attention_heads=3, num_key_value_heads=3, use_bias=True), (3, (1, 4, 4), 5)),
    ],
)
def test_any_cut_equals_the_full_forward(changes, parts, seed):
    """Chunks of random length, some of one token, some that part an image: logits at every token and its experts."""
    model, choose = build(**changes), random.Random(seed)
    runner, talk = make_runner(model), Conversation(model, *parts, seed=seed)
    pages, at = pages_for(len(talk.token_ids), set(), choose), 0
    while at < len(talk.token_ids):
        end = min(at + choose.choice([1, 1, 2, 3, 5, 9]), len(talk.token_ids))
        out = runner.run([talk.row(runner, at, end, pages, experts=True)])
        talk.check(out.logit_SV, at, end)
        if talk.expert_LTK is not None:
            assert out.experts[0] is not None and out.experts[0].dtype == torch.int16
            assert out.experts[0].tolist() == talk.expert_LTK[:, at:end].transpose(0, 1).tolist()
        at = end


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_all_kinds_in_one_step(seed):
    """Requests that start at different times; whole prompts, chunks and single tokens meet in every step."""
    model, choose = build(), random.Random(seed)
    runner, taken = make_runner(model, 128), set()
    kinds = [(9,), (3, (1, 4, 4), 8), (17,), (2, (4, 4, 4), 3, (1, 2, 4), 9), (1,), (6, (1, 6, 4), 2)]
    talks = [Conversation(model, *parts, seed=10 * seed + i) for i, parts in enumerate(kinds)]
    pages = [pages_for(len(talk.token_ids), taken, choose, 128) for talk in talks]
    at, asked = [0] * len(talks), [choose.random() < 0.5 for _ in talks]
    while any(a < len(talk.token_ids) for a, talk in zip(at, talks, strict=True)):
        going = [i for i, talk in enumerate(talks) if at[i] < len(talk.token_ids)]
        going = choose.sample(going, choose.randint(1, len(going)))
        ends = [min(at[i] + choose.choice([1, 1, 1, 4, 11]), len(talks[i].token_ids)) for i in going]
        rows = [
            talks[i].row(runner, at[i], end, pages[i], experts=asked[i]) for i, end in zip(going, ends, strict=True)
        ]
        out = runner.run(rows)
        logits = out.logit_SV.split([row.num_logits for row in rows])
        for i, end, logit_TV, experts in zip(going, ends, logits, out.experts, strict=True):
            talks[i].check(logit_TV, at[i], end)
            assert (experts is None) == (not asked[i])
            if experts is not None:
                assert experts.tolist() == talks[i].expert_LTK[:, at[i] : end].transpose(0, 1).tolist()
            at[i] = end


def test_requests_that_begin_alike_share_pages():
    """The second request computes only what the first has not, over the same pages."""
    model, choose = build(), random.Random(0)
    runner, taken = make_runner(model), set()
    first = Conversation(model, 3, (1, 4, 6), 7)
    shared = len(first.token_ids) // PAGE * PAGE
    pages = pages_for(len(first.token_ids), taken, choose)
    runner.run([first.row(runner, 0, len(first.token_ids), pages)])
    others = [Conversation(model, 3, (1, 4, 6), 7, 5 + i) for i in range(3)]  # the same beginning, then more text
    own = [pages_for(len(other.token_ids) - shared, taken, choose) for other in others]
    rows = [
        other.row(runner, shared, shared + 3, pages[: shared // PAGE] + extra)
        for other, extra in zip(others, own, strict=True)
    ]
    for other, logit_TV in zip(others, runner.run(rows).logit_SV.split(3), strict=True):
        other.check(logit_TV, shared, shared + 3)
    for at in range(shared + 3, len(others[0].token_ids)):
        rows = [
            other.row(runner, at, at + 1, pages[: shared // PAGE] + extra)
            for other, extra in zip(others, own, strict=True)
        ]
        for other, logit_TV in zip(others, runner.run(rows).logit_SV.split(1), strict=True):
            other.check(logit_TV, at, at + 1)


def test_attempts_and_a_common_beginning():
    """Eight rows: three attempts of one prompt, two of another, both after the same system text, and strangers."""
    model, choose = build(**TEXT), random.Random(5)
    runner, taken = make_runner(model, 256), set()
    system = Conversation(model, 2 * PAGE - 1)

    def follow(before: Conversation, count: int, seed: int) -> Conversation:
        talk = Conversation.__new__(Conversation)
        extra = torch.randint(20, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        talk.__dict__ |= dict(token_ids=before.token_ids + extra, media=[], expert_LTK=None)
        talk.position_3T = torch.arange(len(talk.token_ids)).expand(3, -1)
        with torch.no_grad():
            out = model(torch.tensor(talk.token_ids), talk.position_3T, Packed([len(talk.token_ids)]))
            talk.logit_TV = F.linear(out.hidden_TD, model.head_VD)
        return talk

    prompts = [follow(system, 5 * PAGE, 1), follow(system, 3 * PAGE, 2)]
    talks = [follow(prompts[0], 3 + i, 10 + i) for i in range(3)] + [follow(prompts[1], 5, 20 + i) for i in range(2)]
    talks += [Conversation(model, count, seed=30 + count) for count in (1, 9, 27)]
    of_system = pages_for(2 * PAGE, taken, choose, 256)
    of_prompt = [of_system + pages_for(count * PAGE, taken, choose, 256) for count in (5, 3)]
    shared = [of_prompt[0]] * 3 + [of_prompt[1]] * 2 + [[]] * 3
    pages = [
        before + pages_for(len(talk.token_ids) - len(before) * PAGE, taken, choose, 256)
        for before, talk in zip(shared, talks, strict=True)
    ]
    for talk, mine in zip(talks, pages, strict=True):  # prompts, all but the last tokens
        runner.run([talk.row(runner, 0, len(talk.token_ids) - 1, mine)])
    rows = [talk.row(runner, len(t := talk.token_ids) - 1, len(t), p) for talk, p in zip(talks, pages, strict=True)]
    spans = [Span(row.start, 1, row.pages) for row in rows]
    bundles = [part for part in KVCache(runner.cache, spans).bundles if part[1]]
    assert sorted(bundles) == [([0, 1, 2], 7), ([3, 4], 5)]  # 2 + 5 and 2 + 3 pages; nothing is gained by the common 2
    for talk, logit_TV in zip(talks, runner.run(rows).logit_SV.split(1), strict=True):
        talk.check(logit_TV, len(talk.token_ids) - 1, len(talk.token_ids))


def test_what_an_earlier_owner_left_reaches_nobody():
    """A request whose numbers ran over fails alone: its pages go to another one, which sees none of it."""
    model, choose = build(**TEXT), random.Random(1)
    runner, talk = make_runner(model), Conversation(model, 12)
    pages = pages_for(len(talk.token_ids), set(), choose)
    runner.cache.data.fill_(float("nan"))
    at = 0
    for end in (5, 6, 7, 8, 9, 13):
        talk.check(runner.run([talk.row(runner, at, end, pages)]).logit_SV, at, end)
        at = end


def test_a_longer_row_beside_it_brings_nothing():
    """Rows of unequal length are padded to the longest; all that is not theirs is NaN here."""
    model, choose = build(**TEXT), random.Random(6)
    runner, taken = make_runner(model), {0}
    runner.cache.data.fill_(float("nan"))
    talks = [Conversation(model, count, seed=count) for count in (2, 21)]
    pages = [pages_for(len(talk.token_ids), taken, choose) for talk in talks]
    for talk, mine in zip(talks, pages, strict=True):
        runner.run([talk.row(runner, 0, len(talk.token_ids) - 1, mine)])
    ends = [len(talk.token_ids) for talk in talks]
    rows = [talk.row(runner, end - 1, end, p) for talk, end, p in zip(talks, ends, pages, strict=True)]
    for talk, end, logit_TV in zip(talks, ends, runner.run(rows).logit_SV.split(1), strict=True):
        talk.check(logit_TV, end - 1, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_weights_are_used_once_announced(dtype):
    """The runner holds copies of dense weights; training goes on in the model's own."""
    model = build(dtype)
    runner = make_runner(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    runner.weights_changed()
    talk = Conversation(model, 3, (1, 4, 4), 6)
    out = runner.run([talk.row(runner, 0, len(talk.token_ids), list(range(8)))])
    talk.check(out.logit_SV, 0, len(talk.token_ids), tolerance=1e-4 if dtype == torch.float32 else 1e-9)


def test_float32_stays_close():
    model, choose = build(torch.float32), random.Random(2)
    runner, talk = make_runner(model), Conversation(model, 4, (1, 4, 4), 9)
    pages, at = pages_for(len(talk.token_ids), set(), choose), 0
    while at < len(talk.token_ids):
        end = min(at + choose.choice([1, 3, 6]), len(talk.token_ids))
        talk.check(runner.run([talk.row(runner, at, end, pages)]).logit_SV, at, end, tolerance=1e-4)
        at = end


def test_bfloat16_rounds_elsewhere_and_no_more():
    """Against the float64 answer of the same weights: as near as one full forward in bfloat16 is, with a margin."""
    dense = TEXT | dict(sparse_layers=(), num_experts=0, experts_per_token=0, text_expert_width=0)  # no near-ties
    model, choose = build(torch.bfloat16, **dense), random.Random(2)
    runner, talk = make_runner(model), Conversation(model, 30)
    exact = copy.deepcopy(model).set_dtype(torch.float64)
    wanted_TV = Conversation(exact, 30).logit_TV
    pages, at, parts = pages_for(len(talk.token_ids), set(), choose), 0, []
    while at < len(talk.token_ids):
        end = min(at + choose.choice([1, 1, 3, 6]), len(talk.token_ids))
        parts.append(runner.run([talk.row(runner, at, end, pages)]).logit_SV)
        at = end
    ours, full = ((logit_TV - wanted_TV).norm() for logit_TV in (torch.cat(parts).double(), talk.logit_TV.double()))
    assert ours <= 1.25 * full


def test_only_the_logits_that_are_wanted():
    model, choose = build(**TEXT), random.Random(3)
    runner, talk = make_runner(model), Conversation(model, 9)
    pages = pages_for(len(talk.token_ids), set(), choose)
    row = talk.row(runner, 0, 6, pages)
    none, last = (Row(row.token_ids, row.position_3T, 0, pages, num_logits=n) for n in (0, 2))
    assert runner.run([none]).logit_SV.shape == (0, 60)
    talk.check(runner.run([last]).logit_SV, 4, 6)
    assert not runner.run([last]).logit_SV.is_inference()  # a sampler may write into them


def test_features_must_fit_the_placeholders():
    model, choose = build(), random.Random(4)
    runner, talk = make_runner(model), Conversation(model, 2, (1, 4, 4), 2)
    pages = pages_for(len(talk.token_ids), set(), choose)
    row = talk.row(runner, 0, 6, pages)
    with pytest.raises(ValueError, match="2 placeholder tokens, but 1 media features"):
        runner.run([Row(row.token_ids, row.position_3T, 0, pages, features=[row.features[0][:1]])])
    with pytest.raises(ValueError, match="2 placeholder tokens"):
        runner.run([Row(row.token_ids, row.position_3T, 0, pages)])
    with pytest.raises(ValueError, match="text-only model"):
        make_runner(build(**TEXT)).media_features(talk.media)


def test_the_formula_is_the_memory():
    model = build(torch.float32)
    runner = make_runner(model)
    assert runner.cache.data.nbytes == 64 * Runner.page_bytes(model.config, torch.float32, PAGE)
    assert Runner.page_bytes(model.config, torch.bfloat16, 16) == 2 * 3 * 2 * 8 * 2 * 16


def varlen_by_definition(
    q_TNH, k, v, query, keys, longest_q, longest_k, *, seqused_k=None, block_table=None, **options
):
    """What `varlen_attn` computes: row r's queries, the last of which sees all of the row's keys."""
    assert options == dict(window_size=(-1, 0), enable_gqa=q_TNH.shape[1] != k.shape[-2])
    out = torch.empty_like(q_TNH)
    for row, (begin, end) in enumerate(zip(query.tolist()[:-1], query.tolist()[1:], strict=True)):
        if block_table is None:
            mine = slice(int(keys[row]), int(keys[row + 1]))
            k_LGH, v_LGH = k[mine], v[mine]
        else:
            k_LGH, v_LGH = (x[block_table[row].long()].flatten(0, 1)[: int(seqused_k[row])] for x in (k, v))
        assert end - begin <= longest_q and k_LGH.shape[0] <= longest_k
        q, k_, v_ = (x.transpose(0, 1) for x in (q_TNH[begin:end], k_LGH, v_LGH))
        k_, v_ = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k_, v_))
        hidden = torch.ones(q.shape[1], k_.shape[1]).triu(k_.shape[1] - q.shape[1] + 1).bool()
        score = (q @ k_.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
        out[begin:end] = (score.softmax(-1) @ v_).transpose(0, 1)
    return out


@pytest.mark.parametrize("block_tables", [True, False])
def test_what_the_gpu_kernel_is_given(block_tables, monkeypatch):
    """Its offsets, block tables and gathered keys, with a kernel that is the definition: rows of all kinds."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)
    monkeypatch.setattr("inspect.signature", lambda _: SimpleNamespace(parameters={"enable_gqa"}))
    model, choose = build(), random.Random(8)
    runner, taken = make_runner(model), set()
    runner.cache.flash, runner.cache.block_tables = True, block_tables
    talks = [Conversation(model, *parts) for parts in ((9,), (3, (1, 4, 4), 8), (14,))]
    pages = [pages_for(len(talk.token_ids), taken, choose) for talk in talks]
    for steps in [((0, 0, 5), (1, 0, 7)), ((0, 5, 6), (2, 0, 3), (1, 7, 12)), ((2, 3, 4), (0, 6, 7), (1, 12, 13))]:
        out = runner.run([talks[i].row(runner, start, end, pages[i]) for i, start, end in steps])
        logits = out.logit_SV.split([end - start for _, start, end in steps])
        for (i, start, end), logit_TV in zip(steps, logits, strict=True):
            talks[i].check(logit_TV, start, end)


@pytest.mark.gpu
@pytest.mark.parametrize("page_tokens", [16, 256])
def test_a_gpu_in_bfloat16_answers_like_a_full_forward(page_tokens):
    model = build(torch.bfloat16, hidden_size=64, head_dim=16, mrope_section=(3, 3, 2)).cuda()
    runner = Runner(model, num_pages=16, page_tokens=page_tokens, max_rows=4)
    token_T = torch.randint(20, 60, (70,))
    position_3T = torch.arange(70).expand(3, -1)
    with torch.no_grad():
        full = model.logits(model(token_T.cuda(), position_3T.cuda(), Packed([70])).hidden_TD).float()
    cuts = [0, 40, 41, 42, 69, 70]
    pages = list(range(-(-70 // page_tokens)))
    for start, end in zip(cuts, cuts[1:], strict=False):
        row = Row(token_T[start:end].tolist(), position_3T[:, start:end], start, pages, num_logits=end - start)
        torch.testing.assert_close(runner.run([row]).logit_SV, full[start:end], rtol=0.05, atol=0.05 * full.abs().max())
