"""What TRL's DPOTrainer does with images and this family:  python -m tests.bench.dpo_images      (needs torchvision)

Two pairs with an image each, the "small" model with random weights, TRL's and transformers' own processor and collator.
It prints how the first update ends.
"""

import tempfile
import traceback
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.bench import models
from tests.bench.models import SIZES, transformers_config

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def processor() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import (
        Ernie4_5_VLMoeImageProcessor,
        Ernie4_5_VLMoeProcessor,
        Ernie4_5_VLMoeVideoProcessor,
        PreTrainedTokenizerFast,
    )

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    names = ("IMAGE_PLACEHOLDER", "IMAGE_START", "IMAGE_END", "VIDEO_PLACEHOLDER", "VIDEO_START", "VIDEO_END")
    special |= {f"<|{name}|>": models.IMAGE + place for place, name in enumerate(names)}
    vocabulary = special | {f"w{number}": number for number in range(len(special), SIZES["small"].vocabulary)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    media = {
        f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image_start", "image_end", "video_start", "video_end")
    }
    media |= {f"{kind}_token": f"<|{kind.upper()}_PLACEHOLDER|>" for kind in ("image", "video")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", extra_special_tokens=media,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return Ernie4_5_VLMoeProcessor(
        image_processor=Ernie4_5_VLMoeImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Ernie4_5_VLMoeVideoProcessor(),
        chat_template=TEMPLATE,
    )


def main() -> None:
    import datasets
    import transformers
    import trl

    torch.set_num_threads(1)
    transformers.set_seed(0)
    made = transformers.Ernie4_5_VLMoeForConditionalGeneration(transformers_config(SIZES["small"]))
    noise = np.random.default_rng(0)
    rows = [
        dict(
            images=[Image.fromarray(noise.integers(0, 255, (112, 112, 3), dtype=np.uint8))],
            prompt=[dict(role="user", content="w20 w21 w22")],
            chosen=[dict(role="assistant", content=chosen)],
            rejected=[dict(role="assistant", content="w50 w51")],
        )
        for chosen in ("w30", "w40 w41 w42")
    ]
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(f"{folder}/model")  # where TRL takes the reference from
        model = transformers.Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(f"{folder}/model")
        settings = trl.DPOConfig(
            f"{folder}/trl", max_steps=1, per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", max_length=None,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor()
        )
        try:
            trainer.train()
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            print(f"{type(error).__name__}: {error}")
            print(f"    {last.filename.split('site-packages/')[-1]}:{last.lineno}    {last.line}")
        else:
            print(f"one update, loss {trainer.state.log_history[0]['loss']}")
        try:
            trainer.args.precompute_ref_log_probs = True
            trl.DPOTrainer(model, args=trainer.args, train_dataset=trainer.train_dataset, processing_class=processor())
        except ValueError as error:
            print(f"precompute_ref_log_probs: {error}")


if __name__ == "__main__":
    main()
