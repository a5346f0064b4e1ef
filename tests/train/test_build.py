"""How large pictures reach the model is a setting, and stays with the weights."""

import json
from dataclasses import replace

from ernie_model.images import ImageSettings
from ernie_model.processor import Processor
from ernie_model.video import VideoSettings
from tests.tiny import tiny_processor
from train.build import build_processor
from train.config import ModelConfig


def config(**settings) -> ModelConfig:
    return ModelConfig(processor="tiny", config={"model_type": "ernie4_5_vl_moe"}, **settings)


def test_areas_of_pictures_and_frames_are_what_the_user_says():
    architecture = tiny_processor().config
    plain = build_processor(config(), architecture)
    assert (plain.image, plain.video) == (ImageSettings(), VideoSettings())

    own = build_processor(config(image_pixels=[3136, 7056], video_pixels=[784, 5000]), architecture)
    assert own.image == replace(ImageSettings(), min_pixels=3136, max_pixels=7056)
    assert own.video == replace(VideoSettings(), min_pixels=784, max_pixels=5000)


def test_they_are_saved_and_can_be_changed_again(tmp_path):
    architecture = tiny_processor().config
    own = build_processor(config(image_pixels=[3136, 7056]), architecture)
    own.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(architecture.to_json()))
    assert Processor.from_pretrained(tmp_path).image.max_pixels == 7056

    again = ModelConfig(checkpoint=str(tmp_path), image_pixels=[3136, 10000])
    assert build_processor(again, architecture).image.max_pixels == 10000
    assert build_processor(again, architecture).video == Processor.from_pretrained(tmp_path).video
