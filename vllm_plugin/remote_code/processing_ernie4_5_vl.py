"""Pictures for vLLM (trust_remote_code): resized and cut as ernie-train does, as raw values, which vLLM normalises.

Written by ernie-train beside the weights. Pixels equal those that the model was trained on. Frames of a video come from
vLLM's own reader, and no time stamps are drawn on them: a model that was trained with time stamps sees something else.

Shape letters:  P patches   X numbers in a patch (channel, y, x)
"""

import math

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

IMAGE, VIDEO, PLACEHOLDER = "<|image@placeholder|>", "<|video@placeholder|>", "<|IMAGE_PLACEHOLDER|>"


def target_size(height, width, factor, min_pixels, max_pixels):
    """Multiples of `factor`, with an area within the limits."""
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def upright(image):
    """An RGB picture; transparent parts are white."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


class Ernie4_5_VLImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(
        self,
        size=None,
        frame_size=None,
        patch_size=14,
        merge_size=2,
        rescale_factor=1 / 255,
        image_mean=None,
        image_std=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.size = size  # min_pixels and max_pixels, which vLLM reads
        self.frame_size = frame_size or size  # the same of one frame of a video
        self.patch_size, self.merge_size, self.rescale_factor = patch_size, merge_size, rescale_factor
        self.image_mean, self.image_std = image_mean, image_std

    def preprocess(self, images, min_pixels=None, max_pixels=None, **others):
        """Raw patches (P, X) of all pictures, and their grids."""
        patch, merge = self.patch_size, self.merge_size
        low, high = min_pixels or self.size["min_pixels"], max_pixels or self.size["max_pixels"]
        patches, grids = [], []
        for image in images:
            image = upright(image)
            height, width = target_size(image.height, image.width, patch * merge, low, high)
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
            rows, columns = height // patch, width // patch
            blocks = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
            patches.append(blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1))
            grids.append((1, rows, columns))
        return BatchFeature({"pixel_values": np.concatenate(patches), "image_grid_thw": np.array(grids)})


class Ernie4_5_VLProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    valid_kwargs = ["chat_template", "spatial_conv_size", "temporal_conv_size"]
    IMG = f"<|IMAGE_START|>{IMAGE}<|IMAGE_END|>"
    VID = f"<|VIDEO_START|>{VIDEO}<|VIDEO_END|>"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        spatial_conv_size=2,
        temporal_conv_size=2,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.spatial_conv_size, self.temporal_conv_size = spatial_conv_size, temporal_conv_size

    def __call__(self, text=None, images=None, videos=None, **kwargs):
        """Ids with one placeholder for each feature, raw patches of images and then of videos, and their grids."""
        text = text[0] if isinstance(text, (list, tuple)) else text or ""
        limits = {key: kwargs[key] for key in ("min_pixels", "max_pixels") if kwargs.get(key)}
        patches, grids = [], []
        for image in images or []:
            seen = self.image_processor.preprocess([image], **limits)
            patches.append(seen["pixel_values"])
            grids.append(tuple(seen["image_grid_thw"][0]))
        counts = {IMAGE: [rows * columns // self.spatial_conv_size**2 for _, rows, columns in grids], VIDEO: []}
        for video in videos or []:
            frames = list(video[0] if isinstance(video, tuple) else video)
            frames += frames[-1:] * (len(frames) % self.temporal_conv_size)
            seen = self.image_processor.preprocess(frames, **(self.image_processor.frame_size | limits))
            _, rows, columns = seen["image_grid_thw"][0]
            patches.append(seen["pixel_values"])
            grids.append((len(frames), rows, columns))
            tokens = len(frames) // self.temporal_conv_size * rows * columns // self.spatial_conv_size**2
            counts[VIDEO].append(tokens)
        for mark, numbers in counts.items():
            first, *rest = text.split(mark)
            text = first + "".join(PLACEHOLDER * int(n) + part for n, part in zip(numbers, rest, strict=True))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return BatchFeature(
            {
                "input_ids": torch.tensor([ids]),
                "images": torch.from_numpy(np.concatenate(patches)) if patches else None,
                "grid_thw": torch.tensor(grids, dtype=torch.int64) if grids else None,
            }
        )
