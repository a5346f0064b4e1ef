"""The reference policy: equal to the policy before the first update, and afterwards what its settings say."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.batch import PackedBatch
from ernie_model.checkpoint import save_model
from ernie_model.distribution import Distribution
from ernie_model.model import ErnieModel
from ernie_model.tokenizer import tiny_tokenizer_ids
from tests.train import small
from train import checkpoint
from train.build import build_model
from train.config import (
    FilesData,
    HeldIn,
    ModelConfig,
    ParallelConfig,
    PeftConfig,
    PeftKind,
    Precision,
    Recompute,
    UserError,
)
from train.dpo_config import (
    DPOConfig,
    DPOObjectiveConfig,
    ReferenceConfig,
    ReferenceKind,
    ReferenceUpdate,
    reference_kind,
)
from train.footprint import pieces_of
from train.loop import train_step
from train.neftune import install
from train.objectives import LossSum, Objective
from train.parallel.layout import Layout
from train.policy import Policy, on_device
from train.reference import Copy, Reference, build_reference, reference_bytes
from train.shares import Shares
from train.weights import Weights, trained_weights

ARCHITECTURE = small.CONFIG.replace(**tiny_tokenizer_ids())
NONE = PeftConfig()
LORA = PeftConfig(kind=PeftKind.lora, targets=["attention", "dense", "text_experts", "vision"], rank=4, alpha=8.0)


def row(*seeds: int) -> PackedBatch:
    """Every other example has an image; the ids are those of the tiny tokenizer."""
    ids = [getattr(ARCHITECTURE, f"image{kind}_token_id") for kind in ("_start", "", "", "_end")]
    examples = []
    for seed in seeds:
        one = small.example(seed, 9 + seed % 4, image=seed % 2 == 0, learned=4)
        if one.grids:
            one.token_T[:4] = torch.tensor(ids)
            one = dataclasses.replace(one, target_T=torch.cat([one.token_T[1:], one.token_T.new_zeros(1)]))
        examples.append(one)
    return small.row(*examples)


ROWS = [row(0, 1, 2), row(3, 5), row(4)]


class Run:
    """What train/training.py has when it builds a reference."""

    def __init__(
        self,
        *,
        peft: PeftConfig = NONE,
        precision: Precision = Precision.fp32,
        double: bool = False,
        parallel: ParallelConfig | None = None,
        checkpoint: Any = None,
        recompute: Recompute = Recompute.none,
    ):
        self.model_config = ModelConfig(
            config=None if checkpoint else ARCHITECTURE.to_json(),
            checkpoint=None if checkpoint is None else str(checkpoint),
            processor="tiny",
            precision=precision,
            recompute=recompute,
        )
        self.peft, self.double, self.parallel = peft, double, parallel or ParallelConfig(cpu=True)
        built = build_model(
            self.model_config, seed=7, frozen=peft.kind is not PeftKind.none, held_in=self.parallel.held_in
        )
        self.model, self.processor = built.model, built.processor
        self.weights: Weights = trained_weights(self.model, peft, seed=7, base=None)
        if double:
            self.model.set_dtype(torch.float64)
        self.policy = Policy(self.model).train()

    def reference(self, config: ReferenceConfig | None = None, *, start: bool = True, **changes: Any) -> Reference:
        given: dict[str, Any] = dict(
            needed=True, model=self.model_config, peft=self.peft, parallel=self.parallel, seed=7, policy=self.policy,
            weights=self.weights, accelerator=small.accelerator(), layout=Layout(), engine={}, folder=Path(),
        )  # fmt: skip
        reference = build_reference(config or ReferenceConfig(), **(given | changes))
        if isinstance(reference, Copy) and self.double:
            reference.policy.model.set_dtype(torch.float64)
        if start:
            reference.start(None, SimpleNamespace())  # pyright: ignore[reportArgumentType]
        return reference

    def logprobs(self, batch: PackedBatch) -> torch.Tensor:
        moved, row_R = on_device(batch, torch.device("cpu"))
        return self.policy(moved, row_R).logprob_T.detach()

    def rows(self) -> list[PackedBatch]:
        return [small.in_double(row) for row in ROWS] if self.double else ROWS

    def train(self, reference: Reference, steps: int = 1, lr: float = 1e-2) -> list[dict[str, float]]:
        updates = small.updates(self.policy, small.optimizer(self.policy, lr=lr, weight_decay=0.0))
        return [
            train_step(
                updates, PAIRS, self.rows(), accelerator=small.accelerator(), max_grad_norm=1.0, beside=[reference]
            )
            for _ in range(steps)
        ]


def pairs(logprob_T: torch.Tensor, batch: PackedBatch) -> LossSum:
    """-log sigmoid of the first segment's log-ratio against the others'."""
    assert batch.ref_logprob_T is not None
    ratio_T = (logprob_T - batch.ref_logprob_T) * batch.weight_T
    ratio_S = logprob_T.new_zeros(batch.num_segments).index_add(0, batch.segment_T, ratio_T)
    total = -torch.nn.functional.logsigmoid(0.1 * (2 * ratio_S[0] - ratio_S.sum()))
    return LossSum(total, {"loss": total.detach()})


PAIRS = Objective("row", lambda batch: torch.tensor(1.0), pairs)


def numbers(reference: Reference, rows: list[PackedBatch]) -> list[torch.Tensor]:
    """The reference's log-probabilities."""
    found = [row.ref_logprob_T for row in reference.streams(rows)]
    return [one for one in found if one is not None]


def settings(kind: str = "auto", **changes: Any) -> ReferenceConfig:
    update = ReferenceUpdate(changes.pop("update", "frozen"))
    return ReferenceConfig(kind=ReferenceKind(kind), update=update, **changes)


def nudge(run: Run, seed: int = 3) -> None:
    """Move what trains, as updates would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.1 * noise.to(parameter.dtype))


# ---------------------------------------------------------------------------------------------- before the first update


DROPOUT = dataclasses.replace(LORA, targets=["attention"], dropout=0.5)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(
    ("kind", "peft", "held_in"),
    [
        ("copy", NONE, HeldIn.float32),
        ("copy", NONE, HeldIn.bfloat16),
        ("copy", DROPOUT, HeldIn.float32),
        ("adapters_off", DROPOUT, HeldIn.float32),
    ],
    ids=["copy", "copy of weights held in bfloat16", "copy with adapters", "adapters off"],
)
def test_before_the_first_update_every_log_ratio_is_zero(kind, peft, held_in, precision):
    """To the last bit, dropout and noise on embeddings notwithstanding: only the policy has them."""
    zero = ParallelConfig(cpu=True, zero=1 if held_in is HeldIn.bfloat16 else 0, held_in=held_in)
    run = Run(peft=peft, precision=precision, parallel=zero)
    reference = run.reference(settings(kind))
    expected = [run.logprobs(row) for row in ROWS]  # adapters start at B = 0, so dropout does nothing yet
    install(run.policy, 5.0, seed=0, step=lambda: 0)
    generator = torch.get_rng_state()
    for found_T, right_T in zip(numbers(reference, ROWS), expected, strict=True):
        assert torch.equal(found_T, right_T) and right_T.count_nonzero() > 3
    assert torch.equal(torch.get_rng_state(), generator)  # or a run with a reference would draw other numbers
    assert run.policy.training and reference.state()["kind"] == kind


def test_the_first_loss_is_log_2():
    for kind, peft in (("copy", NONE), ("adapters_off", LORA)):
        for precision in Precision:
            run = Run(peft=peft, precision=precision)
            (metrics,) = run.train(run.reference(settings(kind)))
            assert metrics["loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-7), (kind, precision)


@pytest.mark.parametrize("recompute", Recompute)
def test_kinds_agree_after_updates(recompute):
    """Three updates away from the start, in float64: log-probabilities and losses of a copy and of the bare model."""
    found = {}
    for kind in ("copy", "adapters_off"):
        run = Run(peft=LORA, double=True, recompute=recompute)
        reference = run.reference(settings(kind))
        losses = [metrics["loss"] for metrics in run.train(reference, 3)]
        found[kind] = losses, numbers(reference, run.rows()), run.model.state_dict()
    (losses, rows, weights), (its_losses, its_rows, its_weights) = found.values()
    assert losses == pytest.approx(its_losses, abs=1e-10) and losses[2] < losses[0] - 1e-3
    for row, its in zip(rows, its_rows, strict=True):
        torch.testing.assert_close(row, its, rtol=0, atol=1e-10)
    for name, value in weights.items():
        torch.testing.assert_close(value, its_weights[name], rtol=0, atol=1e-10, msg=name)


def test_the_reference_does_not_move_with_the_policy():
    for kind, peft in (("copy", NONE), ("adapters_off", LORA)):
        run = Run(peft=peft)
        reference = run.reference(settings(kind))
        before = numbers(reference, ROWS)
        nudge(run)
        assert not torch.equal(run.logprobs(ROWS[0]), before[0])
        for now_T, then_T in zip(numbers(reference, ROWS), before, strict=True):
            assert torch.equal(now_T, then_T)


def test_frozen_adapters_act_in_the_reference(tmp_path):
    first = Run(peft=LORA, precision=Precision.bf16)
    nudge(first)
    first.weights.publish(tmp_path, "export", first.processor)
    bare = Run(peft=LORA, precision=Precision.bf16).logprobs(ROWS[0])
    run = Run(peft=dataclasses.replace(LORA, frozen={"start": str(tmp_path / "adapter")}), precision=Precision.bf16)
    reference = run.reference()
    assert reference.kind is ReferenceKind.adapters_off
    expected = run.logprobs(ROWS[0])
    nudge(run)
    (found_T,) = numbers(reference, ROWS[:1])
    assert torch.equal(found_T, expected) and not torch.equal(expected, bare)


def test_an_adapter_that_goes_on_is_part_of_the_reference(tmp_path):
    first = Run(peft=LORA)
    nudge(first)
    first.weights.publish(tmp_path, "export", first.processor)
    run = Run(peft=dataclasses.replace(LORA, init_from=str(tmp_path / "adapter")))
    reference = run.reference()
    assert reference.kind is ReferenceKind.copy
    expected = run.logprobs(ROWS[0])
    assert torch.equal(numbers(reference, ROWS[:1])[0], expected)
    assert torch.equal(expected, first.logprobs(ROWS[0]))


def test_other_weights_as_the_reference(tmp_path):
    torch.manual_seed(5)
    other = ErnieModel(ARCHITECTURE)
    save_model(other, tmp_path / "other")
    run = Run(peft=LORA)
    reference = run.reference(settings(checkpoint=str(tmp_path / "other")))
    moved, row_R = on_device(ROWS[0], torch.device("cpu"))
    expected = Policy(other)(moved, row_R).logprob_T
    assert torch.equal(numbers(reference, ROWS[:1])[0], expected)


@pytest.mark.parametrize("kind", ["copy", "adapters_off"])
def test_a_reference_scores_under_what_the_policy_samples_from(kind):
    run = Run(peft=LORA)
    run.policy.distribution = Distribution(temperature=0.6, top_p=0.9, banned_ids=(40, 41))
    (ours,) = numbers(run.reference(settings(kind=kind)), ROWS[:1])
    assert torch.equal(ours, run.logprobs(ROWS[0]))
    run.policy.distribution = None
    assert not torch.allclose(ours, run.logprobs(ROWS[0]))


@pytest.mark.parametrize("kind", ["copy", "adapters_off"])
def test_the_reference_routes_by_itself(kind):
    run = Run(peft=LORA)
    reference = run.reference(settings(kind=kind))
    row = small.replaying(ROWS[0], run.model.config)
    (ours,) = numbers(reference, [row])
    assert torch.equal(ours, numbers(reference, ROWS[:1])[0])
    assert not torch.allclose(ours, run.logprobs(row))


# -------------------------------------------------------------------------------------------------- one that follows


def test_ema_by_hand():
    """mix 0.25 every 2 updates: after four, r = 0.75 (0.75 w0 + 0.25 w2) + 0.25 w4."""
    run = Run(double=True)
    reference = run.reference(settings(update="ema", every=2, mix=0.25))
    assert isinstance(reference, Copy)
    seen = [{name: p.detach().clone() for name, p in run.model.state_dict().items()}]
    for _ in range(4):
        nudge(run, seed=len(seen))
        seen.append({name: p.detach().clone() for name, p in run.model.state_dict().items()})
        reference.after_update(None, None)  # pyright: ignore[reportArgumentType]
    for name, mine in reference.tensors().items():
        right = 0.75 * (0.75 * seen[0][name] + 0.25 * seen[2][name]) + 0.25 * seen[4][name]
        torch.testing.assert_close(mine.detach(), right, rtol=0, atol=1e-14)


def test_small_steps_are_not_lost_in_bfloat16():
    """1000 steps of 0.1 % towards a policy that has moved by 1/8 of a bfloat16 digit arrive at 1 - 0.999^1000."""
    run = Run(precision=Precision.bf16)
    reference = run.reference(settings(update="ema", every=1, mix=0.001))
    assert isinstance(reference, Copy)
    start, weight = run.model.norm.weight.detach().clone(), reference.policy.model.norm.weight
    with torch.no_grad():
        run.model.norm.weight.mul_(1 + 2**-10)
    for _ in range(1000):
        reference.after_update(None, None)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(
        weight / start - 1, torch.full_like(start, 2**-10 * (1 - 0.999**1000)), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("peft", [NONE, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("precision", Precision)
def test_sync_makes_the_reference_the_policy(precision, peft):
    run = Run(precision=precision, peft=peft)
    reference = run.reference(settings(update="sync", every=2))
    start = numbers(reference, ROWS[:1])[0]
    losses = [metrics["loss"] for metrics in run.train(reference, 3)]
    log_2 = torch.tensor(2.0).log().item()
    assert losses[0] == pytest.approx(log_2, rel=1e-7) and losses[2] == pytest.approx(log_2, rel=1e-7) != losses[1]
    assert not torch.equal(numbers(reference, ROWS[:1])[0], start)


def test_an_update_that_is_left_out_does_not_count():
    run = Run()
    reference = run.reference(settings(update="sync", every=1))
    assert isinstance(reference, Copy)
    broken = [dataclasses.replace(row, weight_T=row.weight_T * float("nan")) for row in ROWS]
    updates = small.updates(run.policy, small.optimizer(run.policy))
    metrics = train_step(updates, PAIRS, broken, accelerator=small.accelerator(), max_grad_norm=1.0, beside=[reference])
    assert metrics["skipped"] and reference.updates == 0


@pytest.mark.parametrize("update", [dict(update="ema", every=3, mix=0.3), dict(update="sync", every=3)])
def test_a_resumed_run_has_the_reference_of_one_that_never_stopped(update, tmp_path):
    """Seven updates, or four, a checkpoint, and three more: the reference moves before and after it, at 3 and at 6."""

    def begin() -> tuple[Run, Reference, Any]:
        run = Run(precision=Precision.bf16)
        return run, run.reference(settings(**update)), small.optimizer(run.policy, lr=1e-2)

    def go_on(run: Run, reference: Reference, optimizer: Any, steps: int) -> None:
        updates = small.updates(run.policy, optimizer)
        for _ in range(steps):
            train_step(updates, PAIRS, ROWS, accelerator=small.accelerator(), max_grad_norm=1.0, beside=[reference])

    straight = begin()
    go_on(*straight, 7)
    first = begin()
    go_on(*first, 4)
    saved = first[1].state()
    checkpoint.save(
        tmp_path, 4, weights=first[1].resumable(first[0].weights), optimizer=first[2], state={}, keep=1
    )  # fmt: skip
    second = begin()
    weights = second[1].resumable(second[0].weights)
    checkpoint.load(checkpoint.folder_of(tmp_path, 4), weights=weights, optimizer=second[2])
    second[1].load(saved)
    go_on(*second, 3)
    for name, value in straight[1].resumable(straight[0].weights).tensors().items():
        assert torch.equal(value, weights.tensors()[name]), name


def test_a_frozen_reference_is_not_saved_but_recognised(tmp_path):
    run = Run()
    reference = run.reference(settings("copy"))
    assert reference.resumable(run.weights) is run.weights
    saved = reference.state()
    again = Run().reference(settings("copy"))
    again.load(saved)
    changed = Run().reference(settings("copy"))
    assert isinstance(changed, Copy)
    with torch.no_grad():
        changed.policy.model.norm.weight[0] += 1e-6
    with pytest.raises(UserError, match=re.escape("(or model.config and run.seed) has other contents")):
        changed.load(saved)
    with pytest.raises(UserError, match=r"begun with reference\.kind=copy and goes on with none"):
        Reference().load(saved)


# ------------------------------------------------------------------------------------------------------------- settings


def test_what_auto_stands_for():
    init_from = dataclasses.replace(LORA, init_from="a folder")
    frozen = dataclasses.replace(LORA, frozen={"start": "a folder"})
    assert reference_kind(settings(), NONE, needed=False) is ReferenceKind.none
    assert reference_kind(settings(), NONE, needed=True) is ReferenceKind.copy
    assert reference_kind(settings(), LORA, needed=True) is ReferenceKind.adapters_off
    assert reference_kind(settings(), frozen, needed=True) is ReferenceKind.adapters_off
    assert reference_kind(settings(), init_from, needed=True) is ReferenceKind.copy
    assert reference_kind(settings(checkpoint="a folder"), LORA, needed=True) is ReferenceKind.copy
    assert reference_kind(settings(update="sync", every=9), LORA, needed=True) is ReferenceKind.copy
    assert reference_kind(settings("none"), NONE, needed=False) is ReferenceKind.none


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(kind="cache", checkpoint="x"), "reference.checkpoint=x would not be read: reference.kind is cache."),
        (dict(kind="cache", update="sync", every=2), "reference.update=sync changes the weights of the reference, and"),
        (dict(kind="adapters_off", update="ema", every=2, mix=0.1), "and reference.kind=adapters_off has none"),
        (dict(cache_folder="x"), "reference.cache_folder=x would not be used: reference.kind is auto."),
        (dict(update="sync"), "reference.every is null and reference.update sync; say after how many updates"),
        (dict(every=3), "reference.every is 3 and reference.update frozen; a frozen reference has no use for it."),
        (dict(update="sync", every=0), "reference.every is 0; it must be 1 or more."),
        (dict(update="ema", every=1), "reference.mix is None and reference.update ema; say which share"),
        (dict(update="sync", every=1, mix=0.5), "reference.mix is 0.5 and reference.update sync; only ema"),
        (dict(update="ema", every=1, mix=1.0), "reference.mix is 1.0; it must lie between 0 and 1."),
    ],
)
def test_settings_that_contradict_each_other(given, said):
    with pytest.raises(UserError, match=re.escape(said)):
        settings(**given)


@pytest.mark.parametrize(
    ("given", "peft", "said"),
    [
        (dict(kind="none"), NONE, "reference.kind is none, but the loss compares with a reference."),
        (dict(kind="adapters_off"), NONE, "reference.kind=adapters_off needs an adapter to turn off: peft=lora."),
        (
            dict(kind="adapters_off"),
            dataclasses.replace(LORA, init_from="run/adapter"),
            "without peft.init_from=run/adapter, and training starts with it. To train a new adapter on top, give the "
            "old one as peft.frozen=",
        ),
        (dict(update="ema", every=1, mix=0.1), LORA, "reference.update=ema averages weights"),
    ],
)
def test_references_that_would_be_another_policy(given, peft, said):
    with pytest.raises(UserError, match=re.escape(said)):
        reference_kind(settings(**given), peft, needed=True)
    with pytest.raises(UserError, match=re.escape(said)):  # as soon as settings are read: `ernie doctor` says it too
        DPOConfig(reference=settings(**given), peft=peft)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (dict(checkpoint="x"), "checkpoint=x"),
        (dict(kind="copy"), "kind=copy"),
        (dict(kind="cache"), "kind=cache"),
        (dict(kind="adapters_off"), "kind=adapters_off"),
        (dict(update="sync", every=2), "update=sync"),
    ],
)
def test_a_reference_that_no_loss_compares_with(given, key):
    simpo = DPOObjectiveConfig(preference_loss_type="simpo")
    with pytest.raises(UserError, match=rf"reference\.{key} would do nothing: the loss of these settings compares"):
        DPOConfig(reference=settings(**given), objective=simpo, peft=LORA)


def test_a_reference_with_other_tokens_is_refused(tmp_path):
    save_model(ErnieModel(ARCHITECTURE.replace(vocab_size=ARCHITECTURE.vocab_size + 8)), tmp_path / "other")
    with pytest.raises(UserError, match=r"has vocab_size \d+, and the policy \d+: it would read other words"):
        Run().reference(settings(checkpoint=str(tmp_path / "other")))
    save_model(ErnieModel(ARCHITECTURE.replace(num_hidden_layers=3)), tmp_path / "deeper")
    deeper = settings(checkpoint=str(tmp_path / "deeper"))
    assert Run().reference(deeper).kind is ReferenceKind.copy  # the words are the same
    with pytest.raises(UserError, match=r"reference\.checkpoint=/nowhere: '/nowhere' is neither an existing folder"):
        Run().reference(settings(checkpoint="/nowhere"))
    follow = settings(checkpoint=str(tmp_path / "deeper"), update="sync", every=1)
    with pytest.raises(UserError, match=r"copies weights, but .* has other tensors than the policy, for"):
        Run().reference(follow)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (dict(), 2),
        (dict(model="fp32"), 4),
        (dict(reference=settings(update="ema", every=1, mix=0.1)), 4),
        (dict(reference=settings("cache")), 0),
        (dict(peft=LORA), 0),
        (dict(objective=DPOObjectiveConfig(preference_loss_type="simpo")), 0),
    ],
    ids=["copy", "copy in float32", "average", "cache", "adapters", "no reference"],
)
def test_what_a_second_model_takes_is_known_before_there_is_one(config, size):
    run = Run(precision=Precision.fp32 if config.pop("model", None) else Precision.bf16)
    data = FilesData(path="pairs.jsonl")
    given = DPOConfig(model=run.model_config, data=data, parallel=run.parallel, **config)
    weights = [w for piece in pieces_of(run.model) for w in piece.weights]
    found = reference_bytes(given, weights, Shares(run.parallel, 1))
    assert found == size * sum(p.numel() for p in run.model.parameters())
    if size:
        copy = run.reference(given.reference)
        assert isinstance(copy, Copy)
        routers = 2 * sum(p.numel() for name, p in run.model.named_parameters() if "router" in name) if size == 2 else 0
        assert found + routers == sum(p.nbytes for p in copy.policy.parameters())


def test_what_the_reference_takes_is_told():
    run = Run()
    size = sum(p.nbytes for p in run.model.parameters())
    (note,) = run.reference(settings(update="ema", every=8, mix=0.5)).notes()
    assert f"{size / 1e3:.3g} kB on each rank" in note and "follows the policy by 0.5 after every 8 updates" in note
    assert not Run(peft=LORA).reference().notes()
