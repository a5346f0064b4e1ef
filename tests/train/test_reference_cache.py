"""Log-probabilities on disk: the same numbers, found by content, whole after a kill, and never another model's."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import PackedBatch, Role
from data.encode import Example
from data.fit import Rules
from data.loader import eval_batches
from data.pack import collate
from tests.train import small
from tests.train.test_reference import LORA, NONE, PAIRS, Run, numbers, settings
from train import reference as module
from train.config import FilesData, ModelConfig, PeftConfig, Precision, TaskData, UserError
from train.dpo_config import DPOConfig
from train.loop import train_step
from train.reference import Cached, Reference
from train.reference_cache import alone, key_of, records_of
from train.sources import Data, build_data


def data_of(run: Run, limit: int = 9) -> Data:
    """Digits, each with a picture: three rows to train on, one held out."""
    task = TaskData(task="digits", limit=limit, max_tokens=128)
    return build_data(task, run.processor, rank=0, world=1, max_heldout=3, rules=Rules(max_tokens=128))


def started(run: Run, folder: Path, data: Data | None = None, **changes: Any) -> Reference:
    """As `Run.reference`, which starts it without data."""
    kind = changes.pop("kind", "cache")
    config = settings(kind, **({"cache_folder": str(folder)} if kind == "cache" else {}))
    reference = run.reference(config, start=False, **changes)
    reference.start(None, data or data_of(run))
    return reference


@pytest.fixture
def forwards(monkeypatch) -> list[PackedBatch]:
    """Every row that a reference is computed for."""
    seen: list[PackedBatch] = []
    original = module.Forward.logprobs

    def logprobs(self, batch: PackedBatch) -> torch.Tensor:
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(module.Forward, "logprobs", logprobs)
    return seen


def rows_of(data: Data) -> list[PackedBatch]:
    assert data.heldout_encoder is not None
    return [row for part in (data.encoder, data.heldout_encoder) for row in eval_batches(part) if row is not None]


# ------------------------------------------------------------------------------------------------------------ numbers


def test_all_kinds_give_the_same_losses_and_the_same_weights(tmp_path):
    """Three updates on packed rows with pictures, in float64."""
    found = {}
    for kind in ("copy", "adapters_off", "cache"):
        run = Run(peft=LORA, double=True)
        data = data_of(run)
        reference = started(run, tmp_path, data, kind=kind)
        updates = small.updates(run.policy, small.optimizer(run.policy, lr=1e-2, weight_decay=0.0))
        losses = [
            train_step(
                updates, PAIRS, data.train.next_step(), accelerator=small.accelerator(), max_grad_norm=1.0,
                beside=[reference],
            )["loss"]
            for _ in range(3)
        ]  # fmt: skip
        found[kind] = losses, run.model.state_dict()
    losses, weights = found.pop("copy")
    assert abs(losses[1] - losses[0]) > 1e-3
    for kind, (its_losses, its_weights) in found.items():
        assert its_losses == pytest.approx(losses, abs=1e-10), kind
        for name, value in weights.items():
            torch.testing.assert_close(its_weights[name], value, rtol=0, atol=1e-10, msg=f"{kind} {name}")


@pytest.mark.parametrize("precision", Precision)
def test_rows_packed_otherwise_have_the_numbers_of_their_records(precision, tmp_path):
    """A record's numbers are its own in every row, to the rounding of a product of another shape."""
    run = Run(precision=precision)
    data = data_of(run)
    cached, copy = started(run, tmp_path, data), run.reference(settings("copy"))
    tolerance = {Precision.fp32: 2e-6, Precision.bf16: 0.05}[precision]
    for row in data.train.next_step() + rows_of(data):
        (mine,), (its,) = numbers(cached, [row]), numbers(copy, [row])
        assert (its != 0).sum() == (row.weight_T != 0).sum()
        torch.testing.assert_close(mine, its, rtol=0, atol=tolerance)


def pair(seed: int, *, image: bool) -> Example:
    """A prompt of 6 tokens and answers of 3 and 5, of which the first repeats the prompt's last token."""
    whole = small.example(seed, 6, image=image)
    answers = [small.example(seed + one, length, learned=length - 1) for one, length in ((1, 3), (2, 5))]
    return dataclasses.replace(
        whole,
        token_T=torch.cat([whole.token_T, *(one.token_T for one in answers)]),
        target_T=torch.cat([whole.target_T, *(one.target_T for one in answers)]),
        weight_T=torch.cat([0 * whole.weight_T, *(one.weight_T for one in answers)]),
        position_3T=torch.cat([whole.position_3T, *(one.position_3T + 6 for one in answers)], dim=1),
        lengths=(6, 3, 5),
        stems=(-1, 0, 0),
        roles=(Role.PROMPT, Role.CHOSEN, Role.REJECTED),
        scores=(float("nan"), 2.0, 1.0),
    )


def test_a_row_falls_into_its_records_with_their_pictures():
    examples = [pair(0, image=True), small.example(5, 9), pair(10, image=False), pair(20, image=True)]
    row = collate(examples)
    records = records_of(row, small.CONFIG)
    assert [record.id for record in records] == ["0", "5", "10", "20"]
    assert [record.tokens for record in records] == [slice(0, 14), slice(14, 23), slice(23, 37), slice(37, 51)]
    assert [record.patches for record in records] == [slice(0, 8), slice(8, 8), slice(8, 8), slice(8, 16)]
    assert [record.row_R.tolist() for record in records][1:3] == [[19, 20, 21], [29, 30, 32, 33, 34, 35]]
    for record, example in zip(records, examples, strict=True):
        one, right = alone(row, record), collate([example])
        for field in dataclasses.fields(PackedBatch):
            mine, its = getattr(one, field.name), getattr(right, field.name)
            if isinstance(its, torch.Tensor):
                assert torch.equal(mine, its), field.name
        assert one.lengths == right.lengths and one.grids == right.grids and one.ids == right.ids
        assert (one.stems or (-1,)) == (right.stems or (-1,))
        assert key_of(row, record) == key_of(right, records_of(right, small.CONFIG)[0])


def test_a_key_changes_with_all_that_the_numbers_depend_on_and_with_nothing_else():
    example = pair(0, image=True)
    assert example.patch_PX is not None

    def key(**changes: Any) -> bytes:
        row = collate([dataclasses.replace(example, **changes)])
        return key_of(row, records_of(row, small.CONFIG)[0])

    def with_one_more(stream: torch.Tensor, at: int = -3) -> torch.Tensor:
        changed = stream.clone()
        changed.view(-1)[at] += 1
        return changed

    streams = {name: getattr(example, name) for name in ("token_T", "target_T", "position_3T", "patch_PX")}
    others = [key(**{name: with_one_more(stream)}) for name, stream in streams.items()]
    unlearned = example.weight_T.clone()
    unlearned[-3] = 0.0
    others += [
        key(weight_T=unlearned),
        key(lengths=(6, 4, 4)),
        key(stems=(-1, 0, -1)),
        key(grids=((1, 4, 2),)),
        key(patch_PX=example.patch_PX.double()),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key(weight_T=2 * example.weight_T, id="another", dataset="another", scores=(0.0, 0.0, 0.0)) == key()


# ---------------------------------------------------------------------------------------------------- starts and kills


def test_a_second_start_computes_a_sample_and_nothing_else(tmp_path, forwards):
    run = Run()
    rows = rows_of(data_of(run))
    before = numbers(started(run, tmp_path), rows)
    assert len(forwards) == len(rows) == 4
    forwards.clear()
    again = started(Run(), tmp_path)
    assert [row.ids for row in forwards] == [rows[0].ids, rows[0].ids[:1], rows[3].ids, rows[3].ids[:1]]
    for mine, its in zip(numbers(again, rows), before, strict=True):
        assert torch.equal(mine, its)


def test_more_data_computes_what_is_missing(tmp_path, forwards):
    started(Run(), tmp_path)
    forwards.clear()
    run = Run()
    data = data_of(run, limit=13)
    reference = started(run, tmp_path, data)
    assert len({id for row in forwards for id in row.ids}) < 13 + 3
    assert all((numbers(reference, [row])[0] != 0).any() for row in rows_of(data))


def test_what_a_killed_start_has_written_is_not_computed_again(tmp_path, forwards, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_ROWS", 1)
    original = module.Forward.logprobs

    def killed(self, batch: PackedBatch) -> torch.Tensor:
        if len(forwards) == 2:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Forward, "logprobs", killed)
        started(Run(), tmp_path)
    assert not list(tmp_path.glob("*/all-*.json")) and len(list(tmp_path.glob("*/*.safetensors"))) == 2
    forwards.clear()
    run = Run()
    reference = started(run, tmp_path)
    rows = rows_of(data_of(run))
    # the first row once more and its first record, as a sample; then the third row, then what is held out
    assert [row.ids for row in forwards] == [rows[0].ids, rows[0].ids[:1], rows[2].ids, rows[3].ids]
    for mine, its in zip(numbers(reference, rows), numbers(started(Run(), tmp_path / "b"), rows), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=2e-6)


def test_a_damaged_file_is_removed_and_made_again(tmp_path, forwards):
    run = Run()
    rows = rows_of(data_of(run))
    before = numbers(started(run, tmp_path), rows)
    files = sorted(tmp_path.glob("*/*.safetensors"))
    content = bytearray(files[0].read_bytes())
    content[-2] ^= 1
    files[0].write_bytes(content)
    forwards.clear()
    for mine, its in zip(numbers(started(Run(), tmp_path), rows), before, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=2e-6)
    assert len(forwards) > 1 and sorted(tmp_path.glob("*/*.safetensors")) == files


def test_a_record_that_has_changed_ends_the_run_and_the_next_start_computes_it(tmp_path):
    run = Run()
    data = data_of(run)
    reference = started(run, tmp_path, data)
    (row,) = data.train.next_step()
    changed = dataclasses.replace(row, target_T=row.target_T.roll(1))
    with pytest.raises(UserError, match=rf"{row.ids[0]} has no log-probability in .*The same command, started again"):
        reference.streams([changed])
    assert not list(tmp_path.glob("*/all-*.json"))  # the next start looks at every record


# -------------------------------------------------------------------------------------------------------- other models


def folders(path: Path) -> int:
    return len(list(path.glob("*/model.json")))


def test_numbers_of_another_model_are_not_used_and_that_is_said(tmp_path, capsys, forwards):
    started(Run(), tmp_path)
    forwards.clear()
    run = Run()
    with torch.no_grad():
        run.model.norm.weight[0] += 1e-6
    capsys.readouterr()
    started(run, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "holds log-probabilities of other models (1), which are not used. The newest of them differs" in said
    assert "in weights." in said and len(forwards) == 4 and folders(tmp_path) == 2
    started(Run(precision=Precision.bf16), tmp_path)
    assert folders(tmp_path) == 3


def test_a_new_adapter_does_not_count_but_one_that_acts_does(tmp_path):
    def found(peft: PeftConfig) -> int:
        started(Run(peft=peft), tmp_path / "cache")
        return folders(tmp_path / "cache")

    assert found(NONE) == 1
    assert found(LORA) == 1
    assert found(dataclasses.replace(LORA, targets=["attention"], rank=2, alpha=3.0)) == 1
    first = Run(peft=LORA)
    with torch.no_grad():
        for parameter in first.weights.tensors().values():
            parameter.fill_(0.01)
    first.weights.publish(tmp_path, "export", first.processor)
    start = str(tmp_path / "adapter")
    assert found(dataclasses.replace(LORA, frozen={"start": start})) == 2
    assert found(dataclasses.replace(LORA, init_from=start)) == 3


def test_numbers_that_this_model_does_not_give_are_refused(tmp_path):
    """As if a file had been copied into another model's folder."""
    run = Run()
    reference = started(run, tmp_path)
    assert isinstance(reference, Cached)
    (folder,) = (path.parent for path in tmp_path.glob("*/model.json"))
    (row, *_) = rows_of(data_of(run))
    first = records_of(row, run.model.config)[0]
    right = reference.store.read(key_of(row, first))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    reference.store.add(key_of(row, first), right - 0.001)
    reference.store.write()
    said = f"the log-probability of {row.ids[0]} is {(right - 0.001).sum().item():.6g} there, and the model gives "
    with pytest.raises(UserError, match=re.escape(said + f"{right.sum().item():.6g}")):
        started(Run(), tmp_path)


def test_a_resumed_run_keeps_its_reference(tmp_path):
    """The numbers are of the weights before a checkpoint is loaded, so a lost folder is made again as it was."""
    first = started(Run(), tmp_path / "a")
    again = started(Run(), tmp_path / "b")
    again.load(first.state())
    run = Run()
    with torch.no_grad():
        run.model.norm.weight[0] += 1e-6
    other = started(run, tmp_path / "c")
    with pytest.raises(UserError, match="the weights that training started from are not those that this run was begun"):
        other.load(first.state())


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (dict(path="big.jsonl", streaming=True), "data"),
        (dict(sets={"big": {"path": "big.jsonl", "streaming": True}, "small": {"path": "b.jsonl"}}), "data.sets.big"),
    ],
)
def test_a_stream_is_refused(data, key):
    model = ModelConfig(config={}, processor="tiny")
    DPOConfig(model=model, data=FilesData(**data))
    said = f"and {key}.streaming is true: a stream has no end. Use {key}.streaming=false, or reference.kind=copy."
    with pytest.raises(UserError, match=re.escape(said)):
        DPOConfig(model=model, data=FilesData(**data), reference=settings("cache"))


def test_the_folder_is_the_runs_where_none_is_given(tmp_path):
    run = Run()
    reference = run.reference(settings("cache"), start=False, folder=tmp_path)
    assert f"kept in {tmp_path}/reference" in reference.notes()[0]
