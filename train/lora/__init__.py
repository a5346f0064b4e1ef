"""Low-rank adapters: `peft=lora`. The base model is frozen, small products beside its weights are trained.

    settings.py   which parts, which rank            layers.py   the two adapted layers
    adapt.py      puts the layers into the model     files.py    peft's folder, under transformers' names

`train/adapter_gate.py` checks whatever is written or read against the live model. peft takes seconds to import, so it
is imported by those files only, and those files only where a run has adapters.
"""
