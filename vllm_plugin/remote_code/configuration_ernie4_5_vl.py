"""The flat configuration of ERNIE-4.5-VL for vLLM, which reads its keys as attributes (trust_remote_code).

Written by ernie-train beside the weights; config.json says what the values are.
"""

from transformers import PretrainedConfig


class Ernie4_5_VLVisionConfig(PretrainedConfig):
    model_type = "DFNRope_vision_transformer"
    base_config_key = "vision_config"


class Ernie4_5_VLConfig(PretrainedConfig):
    model_type = "ernie4_5_moe_vl"
    sub_configs = {"vision_config": Ernie4_5_VLVisionConfig}

    def __init__(self, vision_config=None, **kwargs):
        if not isinstance(vision_config, Ernie4_5_VLVisionConfig):
            vision_config = Ernie4_5_VLVisionConfig(**(vision_config or {}))
        self.vision_config = vision_config
        super().__init__(**kwargs)

    @property
    def use_moe(self):
        return max(self.moe_num_experts) > 0
