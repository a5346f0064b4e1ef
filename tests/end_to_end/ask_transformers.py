"""Let transformers answer held-out images with the weights that a run exported, and compare with the expected answers.

    python -m tests.end_to_end.ask_transformers runs/digits          (the last act of `make demo`)

Everything but the conversations is transformers': model, tokenizer, image processor, chat template, generation.
It stands among the tests because the suite itself never imports transformers.
"""

import argparse
import io
import sys
from pathlib import Path

import torch
from PIL import Image

from data.conversation import Conversation
from data.tasks import digits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of experiment=digits")
    parser.add_argument("--images", type=int, default=24, help="how many held-out images (default: %(default)s)")
    options = parser.parse_args()
    try:
        import transformers
    except ImportError:
        print("transformers is not installed and was not asked: pip install 'transformers>=5'")
        return 0
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    asked = digits.conversations("heldout")[: options.images]
    answers = ask(options.run / "export", asked)
    right = sum(answer == conversation.answer for answer, conversation in zip(answers, asked, strict=True))
    print(f"transformers {transformers.__version__} with {options.run / 'export'}:")
    print("expected  " + " ".join(f"{conversation.answer}" for conversation in asked))
    print("answers   " + " ".join(answer or "-" for answer in answers))
    print(f"{right} of the first {len(asked)} held-out images right")
    return 0


def ask(export: Path, conversations: list[Conversation], max_new_tokens: int = 8) -> list[str]:
    """Greedy answers of transformers' model to the first message of each conversation, a picture and a question.

    transformers' `Ernie4_5_VLMoeProcessor` needs torchvision, for its video side. What it does for one image is
    therefore written out here, from transformers' own parts.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Ernie4_5_VLMoeProcessor

    tokenizer = AutoTokenizer.from_pretrained(export)
    images = AutoImageProcessor.from_pretrained(export, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    answers = []
    for conversation in conversations:
        image, question = conversation.messages[0].parts
        assert isinstance(image.media, bytes)
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        pixels = images(Image.open(io.BytesIO(image.media)).convert("RGB"), return_tensors="pt")
        count = int(pixels["image_grid_thw"][0].prod()) // images.merge_size**2
        prompt = prompt.replace(tokenizer.image_token, tokenizer.image_token * count)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        types = Ernie4_5_VLMoeProcessor.create_moe_mm_token_type_ids(tokenizer, ids["input_ids"])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                mm_token_type_ids=(ids["input_ids"] == tokenizer.image_token_id).long(),
                moe_mm_token_type_ids=types,
                **pixels,
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        new = out[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new).split(tokenizer.sep_token)[0].strip())
    return answers


if __name__ == "__main__":
    sys.exit(main())
