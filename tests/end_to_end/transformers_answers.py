"""Does transformers read the exported weights as we do? It answers the held-out images of a run, from the image on.

    python -m tests.end_to_end.transformers_answers RUN_FOLDER [COUNT]

Nothing of ours is on transformers' side: its tokenizer, its chat template, its image processor, its model and its
`generate` read RUN/export. Ours is `Processor` and `ErnieModel` from the same folder. Prints one line per check.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from data.conversation import Conversation, PartKind
from data.dataset import Dataset
from data.encode import encode
from ernie_model.checkpoint import load_model
from ernie_model.context import Packed
from ernie_model.processor import Processor
from train.config import DATA_SCHEMAS
from train.evaluate import answer, prompt_length
from train.sources import open_splits


class Agreement(NamedTuple):
    total: int
    same_tokens: int
    """Prompts that both turn into the same token ids."""
    pixel_error: float
    """Largest difference of a pixel value."""
    logit_error: float
    """Largest difference of a logit where the answer begins, over the largest logit."""
    same_answers: int
    right: int
    """Answers of transformers that are the right ones."""


def heldout_of(run: Path) -> Dataset:
    """The conversations that the run held out."""
    settings = OmegaConf.load(run / "config.yaml")
    schema = OmegaConf.structured(DATA_SCHEMAS[settings.data.kind])
    config: Any = OmegaConf.to_object(OmegaConf.merge(schema, settings.data))
    heldout = open_splits(config).heldout
    assert heldout is not None, f"{run} held nothing out"
    return heldout


class Transformers:
    """The reference, as its users load it."""

    def __init__(self, folder: Path):
        from transformers import AutoImageProcessor, AutoTokenizer, Ernie4_5_VLMoeForConditionalGeneration

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
        self.images = AutoImageProcessor.from_pretrained(folder)
        self.model: Any = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(folder).eval()

    def prompt(self, conversation: Conversation, image: Any) -> dict[str, torch.Tensor]:
        content = [
            {"type": "text", "text": part.text} if part.kind is PartKind.TEXT else {"type": "image"}
            for part in conversation.messages[0].parts
        ]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pixels = self.images(images=[image], return_tensors="pt")
        tokens = int(pixels["image_grid_thw"].prod()) // 4
        text = text.replace("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_PLACEHOLDER|>" * tokens)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        config = self.model.config
        kind = (ids == config.image_token_id).int()
        brackets = (ids == config.image_start_token_id) | (ids == config.image_end_token_id)
        return dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"],
            mm_token_type_ids=kind,
            moe_mm_token_type_ids=kind | brackets.int(),
        )

    def answer(self, prompt: dict[str, torch.Tensor], stop_id: int, max_new_tokens: int) -> list[int]:
        ids = self.model.generate(
            **prompt, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_id, pad_token_id=0
        )
        new = ids[0, prompt["input_ids"].shape[1] :].tolist()
        return new[: new.index(stop_id)] if stop_id in new else new


@torch.no_grad()
def compare(run: Path, count: int, max_new_tokens: int = 8) -> Agreement:
    export = run / "export"
    processor, model = Processor.from_pretrained(export), load_model(export).eval()
    theirs = Transformers(export)
    heldout = heldout_of(run)
    count = min(count, len(heldout))
    same_tokens = same_answers = right = 0
    pixel_error = logit_error = 0.0
    for index in range(count):
        conversation = heldout[index]
        example = encode(conversation, processor, media=heldout.media)
        prompt_T = example.token_T[: prompt_length(example)]
        media = next(part.media for part in conversation.messages[0].parts if part.media is not None)
        prompt = theirs.prompt(conversation, heldout.media.open_image(media))
        same_tokens += prompt["input_ids"][0].tolist() == prompt_T.tolist()
        assert example.patch_PX is not None
        pixel_error = max(pixel_error, (prompt["pixel_values"] - example.patch_PX).abs().max().item())

        length = len(prompt_T)
        hidden_TD = model(
            prompt_T,
            example.position_3T[:, :length],
            Packed([length]),
            patch_PX=example.patch_PX,
            grids=example.grids,
        ).hidden_TD
        ours_V = hidden_TD[-1] @ model.head_VD.T
        theirs_V = theirs.model(**prompt).logits[0, -1]
        logit_error = max(logit_error, ((theirs_V - ours_V).abs().max() / ours_V.abs().max()).item())

        said = theirs.answer(prompt, processor.end_id, max_new_tokens)
        (ours,) = answer(model, [example], stop_id=processor.end_id, max_new_tokens=max_new_tokens)
        same_answers += said == ours.tolist()
        right += processor.decode(said).strip() == conversation.answer
    return Agreement(count, same_tokens, pixel_error, logit_error, same_answers, right)


def main() -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    if len(sys.argv) not in (2, 3):
        print(__doc__)
        return 2
    try:
        import transformers
    except ImportError:
        print("transformers is not installed; nothing to compare (pip install 'ernie-train[test]').")
        return 0
    found = compare(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 40)
    print(f"transformers {transformers.__version__} reads {sys.argv[1]}/export")
    print(f"  prompts with the same tokens   {found.same_tokens} of {found.total}")
    print(f"  largest pixel difference       {found.pixel_error:.1e}")
    print(f"  largest logit difference       {found.logit_error:.1e} of the largest logit")
    print(f"  same answer                    {found.same_answers} of {found.total}")
    print(f"  right answer                   {found.right} of {found.total}")
    return 0 if found.same_answers == found.same_tokens == found.total else 1


if __name__ == "__main__":
    sys.exit(main())
