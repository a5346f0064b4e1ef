"""Whole evaluations with written answers: numbers by hand, resuming, killing, tools, pictures."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from train.config import TrackerConfig, UserError
from train.evaluation.asking import attempt_seed, read_answers
from train.evaluation.statistics import pass_at_k
from train.inference_config import AgentConfig, SamplingConfig

ROOT = Path(__file__).resolve().parents[3]


def plain(results) -> dict:
    """Without what differs from time to time."""
    return {key: value for key, value in results.items() if key != "run"}


def test_right_and_wrong_by_hand(run, sums, adds, text_of, tmp_path):
    """q3 and q9 are answered wrongly; of the 12 sums 0, 2, 4, 3, 5, 7, 6, 8, 10, 9, 11, 13 these are 3 and 9."""
    results, engine = run([sums], lambda p: "99" if adds(p) in ("3", "9") else adds(p))
    one = results["tasks"]["sums"]
    assert one["questions"] == 12 and one["score"]["mean"] == one["accuracy"]["mean"] == 10 / 12
    assert one["score"]["low"] < 10 / 12 < one["score"]["high"]
    assert one["domains"]["even"]["score"]["mean"] == 1 and one["domains"]["odd"]["score"]["mean"] == 4 / 6
    assert one["domains"]["even"]["questions"] == 6
    assert one["endings"] == {"answered": 12} and one["truncated"] == 0 and one["failed"] == one["unscored"] == 0
    assert one["rewards"] == ["number"] and one["tool_use"] == 0 and one["tool_success"] is None
    assert results["overall"]["score"]["mean"] == one["score"]["mean"]
    answers = read_answers(tmp_path / "out" / "answers.jsonl")
    assert [answer.id for answer in answers] == [f"q{a}" for a in range(12)]
    assert [answer.score for answer in answers] == [1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1]
    assert answers[3].answer == answers[3].text == "99" and answers[3].expected == "3"
    assert one["tokens"] == sum(answer.tokens for answer in answers) / 12 > 1
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_the_same_again_gives_the_same_numbers(run, sums, adds, tmp_path):
    wrong = lambda prompt: adds(prompt) if "5" in adds(prompt) else "1"  # noqa: E731
    first, _ = run([sums], wrong, output=str(tmp_path / "a"))
    again, _ = run([sums], wrong, output=str(tmp_path / "b"), concurrency=1)
    same = lambda results: {**plain(results), "settings": 0}  # noqa: E731
    assert same(first) == same(again)
    assert (tmp_path / "a" / "answers.jsonl").read_text() == (tmp_path / "b" / "answers.jsonl").read_text()
    other, _ = run([sums], wrong, output=str(tmp_path / "c"), seed=1)
    assert other["tasks"]["sums"]["score"]["mean"] == first["tasks"]["sums"]["score"]["mean"]
    assert other["tasks"]["sums"]["score"]["low"] is not None


def test_attempts_have_seeds_of_their_own_and_give_pass_at_k(run, sums, adds, tmp_path):
    sampling = SamplingConfig(max_new_tokens=64, temperature=0.8)
    seen: dict[str, int] = {}

    def third_time_lucky(prompt):
        right = adds(prompt)
        seen[right] = seen.get(right, 0) + 1
        return right if seen[right] % 3 == 0 else "no"

    results, _ = run([sums], third_time_lucky, attempts=4, pass_at=[1, 2, 4], sampling=sampling, concurrency=1)
    one = results["tasks"]["sums"]
    assert {k: value["mean"] for k, value in one["pass_at"].items()} == pytest.approx(
        {str(k): pass_at_k(4, 1, k) for k in (1, 2, 4)}
    )
    assert one["score"]["mean"] == pytest.approx(1 / 4)
    answers = read_answers(tmp_path / "out" / "answers.jsonl")
    assert len({answer.seed for answer in answers}) == 48
    assert answers[5].seed == attempt_seed(0, "sums", "q1", 1)


def test_cut_off_answers_and_questions_that_fail(run, write, adds, sums):
    from ernie_model.inference.request import RequestError

    long = write([{"prompt": "long?", "answer": "1", "reward": "number"}], "long.jsonl")
    results, _ = run([long], lambda p: "1 " * 50, per_task={"long": {"max_new_tokens": 5}})
    one = results["tasks"]["long"]
    assert one["truncated"] == 1 and one["endings"] == {"truncated": 1} and one["tokens"] == 5

    def refuses(prompt):
        if adds(prompt) == "3":
            raise RequestError("prompt is too long")
        return adds(prompt)

    output = str(Path(sums).parent / "refused")
    with pytest.raises(UserError, match="1 of 12 answers failed and have no score.*asks just these again"):
        run([sums], refuses, output=output)
    saved = json.loads((Path(output) / "results.json").read_text())["tasks"]["sums"]
    assert saved["failed"] == saved["unscored"] == 1 and saved["score"]["mean"] == 1
    # and again, when it is possible
    results, engine = run([sums], adds, output=output)
    assert len(engine.prompts) == 1 and results["tasks"]["sums"]["failed"] == 0


def test_an_evaluation_goes_on_where_it_was(run, sums, adds, tmp_path):
    whole, _ = run([sums], adds, output=str(tmp_path / "whole"))
    count = 0

    def dies(prompt):
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        return adds(prompt)

    with pytest.raises(
        UserError, match="stopped. .*answers.jsonl keeps what was answered; the same command with output"
    ):
        run([sums], dies, concurrency=1)
    path = tmp_path / "out" / "answers.jsonl"
    assert len(read_answers(path)) == 5 and not (tmp_path / "out" / "results.json").exists()
    with path.open("a") as file:
        file.write('{"task": "sums", "id": "q')  # killed in the middle of a line
    results, engine = run([sums], adds)
    assert len(engine.prompts) == 7
    assert results["tasks"] == whole["tasks"]
    assert path.read_text() == (tmp_path / "whole" / "answers.jsonl").read_text()
    # a third time nothing is asked
    again, engine = run([sums], adds)
    assert engine.prompts == [] and plain(again) == plain(results)


def test_a_folder_of_another_evaluation_is_refused(run, sums, adds, tmp_path):
    run([sums], adds)
    with pytest.raises(
        UserError, match="(?s)holds other answers.*settings.seed: 0 then, 1 now\nChoose another output="
    ):
        run([sums], adds, seed=1)
    with pytest.raises(UserError, match="(?s)holds other answers.*questions.sums: .*settings.limit: None then, 3 now"):
        run([sums], adds, limit=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output=.*cannot be written"):
        run([sums], adds, output=str(tmp_path / "file" / "x"))
    (tmp_path / "out" / "answers.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="answers.jsonl:1 is not an answer"):
        run([sums], adds)


KILLED = """
import asyncio, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from rich.console import Console
import torch
from ernie_model.model import ErnieModel
from tests.tiny import tiny_processor
from tests.ernie_model.inference.scripted import ScriptedEngine
from train.compose import plain
from train.evaluation.evaluation import agents_of, evaluate
from train.evaluation.questions import open_tasks
from train.inference_config import EvaluationConfig, SamplingConfig
from train.served import Served
processor = tiny_processor()
torch.manual_seed(0)
served = Served(ErnieModel(processor.config).eval(), processor)
sampling = SamplingConfig(max_new_tokens=64)
config = EvaluationConfig(
    checkpoint="tiny", tasks=[{sums!r}], output={out!r}, sampling=sampling, likelihood=False, concurrency=2)
tasks = open_tasks(config)
engine = ScriptedEngine(processor.tokenizer, lambda prompt: str(len(prompt.token_ids)), pause_s={pause})
evaluate(config, plain(config), tasks, served, agents_of(config, tasks, served, engine), Console(quiet=True), {{}})
"""


def test_killed_and_started_again(sums, tmp_path):
    """By SIGKILL, in another process, while answers are being written."""
    out = tmp_path / "out"
    (tmp_path / "slow.py").write_text(KILLED.format(root=str(ROOT), sums=sums, out=str(out), pause=0.05))
    (tmp_path / "fast.py").write_text(KILLED.format(root=str(ROOT), sums=sums, out=str(out), pause=0))
    slow = subprocess.Popen([sys.executable, str(tmp_path / "slow.py")])
    path, deadline = out / "answers.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < 3:
        assert time.monotonic() < deadline and slow.poll() is None
        time.sleep(0.01)
    os.kill(slow.pid, signal.SIGKILL)
    assert slow.wait() == -signal.SIGKILL
    before = read_answers(path) if path.read_text().endswith("\n") else None
    subprocess.run([sys.executable, str(tmp_path / "fast.py")], check=True)
    answers = read_answers(path)
    assert [answer.id for answer in answers] == [f"q{a}" for a in range(12)]
    assert before is None or (3 <= len(before) < 12 and all(one in answers for one in before))
    assert json.loads((out / "results.json").read_text())["tasks"]["sums"]["questions"] == 12


ZOOM = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%s]}}\n</tool_call>\n'


def test_tools_are_used_counted_and_shown(run, write, picture, text_of, tmp_path):
    image = {"type": "image", "image": picture.name}
    records = [
        {"id": name, "messages": [{"role": "user", "content": [image, {"type": "text", "text": name}]}], "answer": "7"}
        for name in ("zooms", "fails", "looks")
    ]
    path = write(records)

    def reply(prompt):
        text = text_of(prompt)
        if "tool_output" in text or "looks" in text:
            return "7"
        return ZOOM % ("0, 0, 500, 500" if "zooms" in text else "9, 9, 1, 1")

    tools = ["image_zoom_in_tool"]
    results, _ = run([path], reply, reward="exact", agent=AgentConfig(tools=tools), tracker=TrackerConfig())
    one = results["tasks"]["mine"]
    assert one["score"]["mean"] == 1
    assert one["tool_use"] == pytest.approx(2 / 3) and one["tool_success"] == pytest.approx(1 / 2)
    answers = {answer.id: answer for answer in read_answers(tmp_path / "out" / "answers.jsonl")}
    assert [call["failed"] for call in answers["fails"].calls] == [True]
    assert answers["zooms"].turns == 2 and answers["zooms"].calls[0]["name"] == "image_zoom_in_tool"
    (crop,) = answers["zooms"].pictures
    with Image.open(tmp_path / "out" / crop) as image:
        assert image.size == (28, 28)  # a quarter of 56 x 56
    with Image.open(tmp_path / "out" / "pictures" / "mine-000.png") as shown:
        assert shown.getpixel((159, 80)) == (0x09, 0x69, 0xDA)  # right edge of what was looked at: 500/1000 of 320
    # a reward that looks at the calls
    results, _ = run(
        [path], reply, reward="tool_success", agent=AgentConfig(tools=tools), output=str(tmp_path / "tools")
    )
    assert results["tasks"]["mine"]["score"]["mean"] == pytest.approx(1 / 3)


def test_the_page_the_sheet_and_the_trackers_table_show_boxes(run, write, picture, tmp_path):
    image = {"type": "image", "image": picture.name}
    asked = [{"role": "user", "content": [image, {"type": "text", "text": "Where is <b>it</b>?"}]}]
    gold = '[{"bbox_2d": [100, 100, 500, 500], "label": "it"}]'
    path = write([{"id": "q", "messages": asked, "answer": gold, "reward": "grounding_f1"}])
    said = '[{"bbox_2d": [500, 500, 900, 900], "label": "it"}]'
    results, _ = run([path], lambda prompt: said, tracker=TrackerConfig(trackio=True, tensorboard=True))
    out = tmp_path / "out"
    page = (out / "answers.html").read_text()
    assert "Where is &lt;b&gt;it&lt;/b&gt;?" in page and "<b>it</b>" not in page
    assert page.count("data:image/") == 1 and "article class=wrong" in page
    with Image.open(out / "pictures" / "mine-000.png") as shown:
        colours = {colour for _, colour in shown.getcolors(maxcolors=1 << 20)}
        assert {(0x2D, 0xA4, 0x4E), (0xCF, 0x22, 0x2E)} <= colours, "both boxes"
        assert shown.getpixel((32, 100)) == (0x2D, 0xA4, 0x4E)  # left edge of the right one: 100/1000 of 320
    assert (out / "answers.png").exists()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (table,) = [record for record in records if "table" in record]
    assert table["rows"][0][0] == "pictures/mine-000.png" and table["rows"][0][2] == 0 and table["rows"][0][5] == said
    assert records[0]["eval_mine_score"] == 0 == records[0]["eval_score"]


def test_thought_is_not_the_answer(run, sums, adds, served, tmp_path):
    reply = lambda prompt: f"\nIt is 99.\n</think>\n{adds(prompt)}"  # noqa: E731
    results, engine = run([sums], reply, sampling=SamplingConfig(max_new_tokens=64, thinking=True))
    assert results["tasks"]["sums"]["score"]["mean"] == 1
    answer = read_answers(tmp_path / "out" / "answers.jsonl")[0]
    assert "99" in answer.reasoning and "99" not in answer.answer
    assert served.processor.decode(list(engine.prompts[0].token_ids)).rstrip().endswith("<think>")


def test_the_table_in_the_terminal(run, sums, write, adds, tmp_path):
    other = write([{"id": "x", "prompt": "1 + 1 = ?", "answer": "2.1", "reward": "number"}], "other.jsonl")
    with (tmp_path / "table.txt").open("w") as file:
        run([sums, other], adds, Console(file=file, width=160), likelihood=True)
    text = (tmp_path / "table.txt").read_text()
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert next(line for line in lines if line[0] == "sums")[1:4] == ["12", "100.0", "%"]
    assert next(line for line in lines if line[0] == "other")[1:4] == ["1", "0.0", "%"]
    assert next(line for line in lines if line[:3] == ["mean", "of", "tasks"])[3:5] == ["50.0", "%"]
    assert "ppl" in text and "odd" in text and "used tools" not in text and "results.json" in text


def test_the_record_of_a_question_may_define_tools_of_its_own(run, write, text_of):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    path = write([{"id": "q", "messages": [{"role": "user", "content": "?"}], "tools": [tool], "answer": "x"}])
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
    results, engine = run([path], lambda prompt: call, reward="exact")
    assert "weather" in text_of(engine.prompts[0])
    one = results["tasks"]["mine"]
    assert one["endings"] == {"calls": 1} and one["tool_use"] == 1 and one["score"]["mean"] == 0


def test_a_users_function_as_metric(run, sums, adds, tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(
        textwrap.dedent("""
        def half(attempt, expected):
            return 0.5 if attempt.answer == expected else None
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    wrong = lambda prompt: "x" if adds(prompt) == "3" else adds(prompt)  # noqa: E731
    results, _ = run([sums], wrong, per_task={"sums": {"reward": "python:own_metric.half"}})
    one = results["tasks"]["sums"]
    assert one["score"]["mean"] == 0.5 and one["accuracy"]["mean"] == 0 and one["unscored"] == 1
