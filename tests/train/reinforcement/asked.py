"""Groups of scored attempts as a rollout makes them, for tests of what is recorded of it."""

from collections.abc import Sequence

from PIL import Image

from data.conversation import Conversation, Message, Part
from data.media import MediaFolder
from ernie_model.inference.agent import Episode, Status, Turn
from ernie_model.inference.parsing import ToolCallText
from ernie_model.inference.request import Completion, Finish
from ernie_model.inference.tools import ToolResult
from ernie_model.processor import Processor
from tests.tiny import tiny_processor
from train.evaluation.questions import Question
from train.reinforcement.groups import Group, Scored, Scores, Ticket
from train.rewards.registry import reward_named

PROCESSOR: Processor = tiny_processor()
TOKENIZER = PROCESSOR.tokenizer
ZOOM = '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 200, 300, 400]}}'


def ids_of(*texts: str) -> list[int]:
    """Of words and special tokens."""
    return TOKENIZER.encode_markup("".join(texts))


def question(number: int = 0, text: str = "Which digit?", expected: str = "7") -> Question:
    conversation = Conversation(id=f"q{number}", messages=(Message(role="user", parts=(Part.of_text(text),)),))
    return Question(
        task="set",
        id=f"q{number}",
        conversation=conversation,
        expected=expected,
        reward_name="exact",
        reward=reward_named("exact"),
        options={},
        domain="digits",
        media=MediaFolder(None),
        tools=("image_zoom_in_tool",),
        max_new_tokens=8,
        thinking=True,
    )


def attempt(
    answer: str,
    total: float | None,
    *,
    crop: Image.Image | None = None,
    status: Status = Status.ANSWERED,
    problem: str | None = None,
    thought: str = "let me see",
) -> Scored:
    """`crop`: what a call of the zoom tool returned before."""
    prompt = ids_of("<|begin_of_sentence|>", "Which digit?", "<think>")
    episode = Episode(list(prompt), [], [], num_prompt_tokens=len(prompt), status=status, answer=answer)
    episode.sampled, episode.logprobs, episode.versions = [False] * len(prompt), [0.0] * len(prompt), [-1] * len(prompt)

    def write(*texts: str, sampled: bool) -> str:
        ids = ids_of(*texts)
        episode.token_ids += ids
        episode.sampled += [sampled] * len(ids)
        episode.logprobs += [-0.5] * len(ids) if sampled else [0.0] * len(ids)
        episode.versions += [0 if sampled else -1] * len(ids)
        return "".join(texts)

    def turn(text: str, calls: Sequence[ToolCallText] = (), results: Sequence[ToolResult] = ()) -> Turn:
        completion = Completion((), text, Finish.STOP, (), ())
        return Turn(text, "", answer, tuple(calls), completion, tuple(results))

    if crop is not None:
        said = write("zoom", "</think>", "<tool_call>", ZOOM, "</tool_call>", "<|end_of_sentence|>", sampled=True)
        call = ToolCallText("image_zoom_in_tool", '{"bbox_2d": [100, 200, 300, 400]}', None)
        episode.turns.append(turn(said, [call], [ToolResult((crop,))]))
        shown = ("<|IMAGE_START|>", *["<|IMAGE_PLACEHOLDER|>"] * 4, "<|IMAGE_END|>")
        write("User: ", *shown, "Assistant: ", "<think>", sampled=False)
        episode.images.append(crop)
    episode.turns.append(turn(write(thought, "</think>", answer, "<|end_of_sentence|>", sampled=True)))
    scores = Scores(parts={"accuracy": total}, accuracy=total, total=total, problem=problem)
    return Scored(episode=episode, scores=scores)


def group(number: int, *attempts: Scored, prompt: int = 0, version: int = 0) -> Group:
    return Group(ticket=Ticket(group=number, prompt=prompt), version=version, attempts=attempts)
