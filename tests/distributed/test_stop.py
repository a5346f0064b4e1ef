"""What happens to all ranks when something happens to one."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.distributed.gloo import environments
from tests.programs import Program
from train import checkpoint

SETTINGS = [
    "experiment=digits",
    "tracker=none",
    "run.steps=400",
    "run.save_every=4",
    "optim.warmup_steps=1",
    "data.max_tokens=128",
    "evaluate.every=0",
    "evaluate.max_examples=2",
    "evaluate.sheet=0",
    "parallel.cpu=true",
]


class TwoRanks:
    """`ernie sft` as two gloo processes, without a launcher that would end the second one."""

    def __init__(self, folder: Path, *settings: str):
        self.folder = folder
        self.said = [folder.parent / f"rank-{rank}.txt" for rank in (0, 1)]
        self.processes = []
        for rank, (environment, said) in enumerate(zip(environments(2), self.said, strict=True)):
            with said.open("w") as output:
                self.processes.append(
                    Program(
                        ["-m", "train.sft", *SETTINGS, *settings, f"run.folder={folder}"],
                        nursery=rank,
                        cwd=folder.parent,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not happened():
            assert all(process.poll() is None for process in self.processes), self.output
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def codes(self) -> list[int]:
        return [process.wait(200) for process in self.processes]

    @property
    def output(self) -> list[str]:
        return [said.read_text() for said in self.said]

    def __enter__(self) -> "TwoRanks":
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def last_seen(folder: Path, rank: int) -> dict:
    return json.loads((folder / "data" / f"rank-{rank}.jsonl").read_text().splitlines()[-1])


def test_sigterm_on_one_rank_saves_on_all_and_a_killed_rank_leaves_no_half_checkpoint(tmp_path):
    folder = tmp_path / "run"
    with TwoRanks(folder) as run:
        run.wait_until(lambda: bool(checkpoint.complete(folder / "checkpoints")))
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.codes() == [0, 0], run.output
    (*_, newest) = checkpoint.complete(folder / "checkpoints")
    step = int(newest.name[5:])
    # both ended at the same step, and saved it, whether or not it was due
    assert last_seen(folder, 0)["step"] == last_seen(folder, 1)["step"] == step
    assert checkpoint.damage(newest) is None
    assert "the same command goes on from there" in run.output[0]

    with TwoRanks(folder) as run:
        run.wait_until(lambda: last_seen(folder, 1)["step"] > step + 4)
        run.wait_until(lambda: any((folder / "checkpoints").glob(".step-*.partial")))
        run.processes[1].kill()
        assert run.processes[0].wait(200) != 0  # it notices, and doesn't wait for ever
    found, problems = checkpoint.newest_undamaged(folder / "checkpoints")
    assert found is not None and not problems and int(found.name[5:]) > step
    checkpoint.sweep(folder / "checkpoints")
    assert all(path.name.startswith("step-") for path in (folder / "checkpoints").iterdir())


def test_what_all_ranks_find_wrong_is_said_once(tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": 7}\n')
    with TwoRanks(tmp_path / "run", "data=files", f"data.path={data}") as run:
        assert run.codes() == [1, 1]
    said = [text for text in run.output if "bad.jsonl:1" in text]
    assert len(said) == 1, run.output
    assert "Traceback" not in "".join(run.output)
