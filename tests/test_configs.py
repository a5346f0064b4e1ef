"""Every file in configs/ composes and converts; every mistake in a setting is told in one sentence that helps."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from train.build import read_architecture
from train.compose import (
    ENTRIES,
    GROUPS,
    differences,
    known_keys,
    plain,
    register,
    to_typed,
)
from train.config import (
    FilesData,
    Precision,
    Schedule,
    SFTConfig,
    TaskData,
    UserError,
    check_steps,
    suggestion,
)
from train.explain import explain
from train.inference_config import ServeConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = ("lora_vl_28b", "full_vl_28b", "lora_21b_text", "full_0_3b")  # for data that users bring
PAIRS = ("optim=dpo", *(f"experiment={file.stem}" for file in CONFIGS.glob("experiment/*dpo*.yaml")))
PAIRS += tuple(f"objective={file.stem}" for file in CONFIGS.glob("objective/*.yaml") if file.stem != "sft")
ROLLOUTS = ("optim=rl", *(f"experiment={file.stem}" for file in CONFIGS.glob("experiment/*rl*.yaml")))
ROLLOUTS += tuple(
    f"objective={file.stem}" for file in CONFIGS.glob("objective/*.yaml") if "kind: rl" in file.read_text()
)
ON_TASKS = [
    f"experiment={file.stem}" for file in CONFIGS.glob("experiment/*.yaml") if "/data: task" in file.read_text()
]
CHOICES = [f"{group}={file.stem}" for group in GROUPS for file in sorted((CONFIGS / group).glob("*.yaml"))]


def load(*overrides: str, entry: str = "sft") -> Any:
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_typed(compose(entry, overrides=list(overrides)), ENTRIES[entry])


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes(choice):
    theirs = ("data=files", *(f"experiment={name}" for name in RECIPES))
    task = ["data.task=counting"] if choice.endswith("=task") else []
    needed = ["data.path=chats.jsonl"] if choice in theirs else task
    entry = "rl" if choice in ROLLOUTS else "dpo" if choice in PAIRS else "sft"
    needed += ["data.path=pairs.jsonl"] if entry != "sft" and choice not in ON_TASKS else []
    assert isinstance(load(choice, *needed, entry=entry), ENTRIES[entry])


def test_an_objective_belongs_to_its_command():
    assert "`ernie dpo` has an objective of its own" in message("objective=sft", "data.path=a.jsonl", entry="dpo")
    assert "`ernie sft` has an objective of its own" in message("objective.kind=dpo")


def test_a_wrong_objective_is_answered_with_those_of_the_command():
    for entry, one, other in (("rl", "gspo", "kto"), ("dpo", "kto", "gspo"), ("sft", "sft", "kto")):
        text = message("objective=nothing_like_it", "data.path=a.jsonl", entry=entry)
        listed = text.partition("It can be ")[2].rstrip(".").split(", ")
        assert one in listed and other not in listed, text
    assert "did you mean objective=gspo?" in message("objective=gsop", "data.path=a.jsonl", entry="rl")


def test_there_is_something_to_compose():
    assert len(CHOICES) >= 15 and "experiment=digits" in CHOICES and "data=files" in CHOICES


def test_command_line_beats_experiment_beats_group_beats_schema():
    config = load("experiment=digits", "optim.lr=0.5")
    assert config.optim.lr == 0.5  # command line
    assert config.run.name == "digits" and config.run.folder == "runs/digits"  # experiment
    assert config.model.precision is Precision.fp32  # group; the schema says bf16
    assert config.optim.beta2 == 0.95 and config.optim.schedule is Schedule.cosine  # schema
    assert isinstance(config.data, TaskData) and config.data.task == "digits"


def test_files_have_settings_of_its_own():
    config = load("data=files", "data.path=a.jsonl", "data.eval_fraction=0.1")
    assert isinstance(config.data, FilesData) and config.data.eval_fraction == 0.1


def test_the_recipe_of_the_family_and_the_users_own_rates():
    optim = load("optim.lr_scale={layers.0.*: 0.5}", "optim.lr_scale.resampler=2").optim
    assert optim.freeze == ["vision"] and optim.warmup_steps == 100 and optim.vision_layer_decay == 0.9
    assert optim.lr_scale == {"router": 0.01, "vision": 0.9, "layers.0.*": 0.5, "resampler": 2.0}
    assert load("experiment=digits").optim.freeze == [] and load("optim=adamw").optim.lr_scale == {}


@pytest.mark.parametrize(
    "chosen, names",
    [
        ("tracker=none", ["none"]),
        ("tracker=wandb", ["wandb"]),
        ("tracker=[trackio,tensorboard]", ["trackio", "tensorboard"]),
    ],
)
def test_several_trackers_at_once(chosen, names):
    assert load(chosen).tracker.names == names


def message(*overrides: str, entry: str = "sft") -> str:
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - Hydra's and ours; the message is what is tested
        load(*overrides, entry=entry)
    return str(caught.value) if isinstance(caught.value, UserError) else explain(caught.value, entry, overrides)


@pytest.mark.parametrize(
    "override, expected",
    [
        # typos
        ("optim.leer=1", "optim.leer is not a setting of sft; did you mean optim.lr?"),
        ("optim.warmup=1", "did you mean optim.warmup_steps?"),
        ("steps=5", "steps is not a setting of sft; did you mean run.steps?"),
        ("lr=1", "did you mean optim.lr?"),
        ("run.resum=never", "did you mean run.resume?"),
        ("data.held=1", "data.held is not a setting of sft"),
        ("+optim.leer=1", "optim.leer is not a setting of sft; did you mean optim.lr?"),
        ("model.config.hiden_size=3", "model.config.hiden_size is not a setting"),
        ("datta=digits", "datta is not a setting of sft; did you mean data?"),
        ("data=digts", "there is no configs/data/digts.yaml; did you mean data=digits? It can be digits, files, task."),
        ("experiment=digitz", "there is no configs/experiment/digitz.yaml; did you mean experiment=digits?"),
        ("data.path=a.jsonl", "data.path is not a setting of the chosen data; it belongs to data=files."),
        ("run.folder=~/a", "run.folder=~/a cannot be read: a character in it has a meaning of its own. Put quotes"),
        ("garbage", "garbage is not a setting: settings are written as key=value."),
        # wrong types
        ("optim.lr=many", "optim.lr=many: could not be converted to Float."),
        ("optim.schedule=cosin", "optim.schedule=cosin: expected one of [constant, linear, cosine]."),
        ("run.keep=null", "run.keep=null: field 'run.keep' is not Optional."),
        # values that break a rule
        ("optim.lr=-1", "optim.lr is -1.0; it must be positive."),
        ("optim.beta2=1", "optim.beta2 is 1.0; it must lie in 0..1, 1 excluded."),
        ("data.accumulation=0", "data.accumulation is 0; it must be at least 1."),
        ("data.max_tokens=1", "data.max_tokens is 1; a row needs at least 2 tokens."),
        ("run.steps=0", "run.steps is 0; it must be at least 1."),
        ("optim.lr_scale.router=0", "optim.lr_scale has router: 0.0; a scale must be positive and finite."),
        ("optim.vision_layer_decay=1.5", "optim.vision_layer_decay is 1.5; it must be more than 0 and at most 1."),
        ("objective.neftune_alpha=-1", "objective.neftune_alpha is -1.0; it must be 0 (off) or a positive number"),
        ("optim.eps=0", "optim.eps is 0.0; it must be positive."),
        ("optim.lr=inf", "optim.lr is inf; it must be a finite number."),
        ("run.epochs=inf", "run.epochs is inf; it must be a finite number."),
        ("parallel.threads=-1", "parallel.threads is -1; it must be 0 or more."),
        ("data.seed=-1", "data.seed is -1; it must lie in 0..18446744073709551615."),
        ("run.seed=99999999999999999999", "run.seed is 99999999999999999999; it must lie in 0..18446744073709551615."),
        ("run.keep=0", "run.keep is 0; at least the newest checkpoint must stay."),
        ("evaluate.every=-1", "evaluate.every is -1; it must be 0 or more."),
        ("objective.balance.text=-1", "objective.balance.text is -1.0; it must be 0 (off) or a positive number."),
        ("objective.z_loss.vision=inf", "objective.z_loss.vision is inf; it must be 0 (off) or a positive number."),
        ("tracker.images_every=-1", "tracker.images_every is -1; it must be 0 or more."),
        ("objective.bias_update=-1", "objective.bias_update is -1.0; it must be 0 (off) or a positive number."),
        (
            "objective.balance.txt=1",
            "objective.balance.txt is not a setting of sft; did you mean objective.balance.text?",
        ),
        # values that contradict each other
        ("objective.orthogonal_decoupled=true", "but objective.orthogonal is 0 for both pools."),
        ("run.steps=10 optim.warmup_steps=10", "optim.warmup_steps (10) is not shorter than the run (run.steps=10)"),
        ("run.steps=10 optim=adamw evaluate.every=11", "evaluate.every (11) is longer than the run (run.steps=10)"),
        ("peft.init_from=adapter", "peft.init_from is given, but peft.kind is none"),
        ("experiment=lora_21b_text data.path=a peft=none", "peft.targets is given, but peft.kind is none"),
        ("model.config=null", "model.checkpoint and model.config are both null"),
        ("model.offload_activations=true", "recomputed layers, but model.recompute is none."),
        ("model.processor=null", "model.processor is null and there is no model.checkpoint"),
        ("model.image_pixels=[3136]", "model.image_pixels is [3136]; it must be two numbers of pixels"),
        ("model.video_pixels=[3136,700]", "model.video_pixels is [3136, 700]; it must be two numbers of pixels"),
        ("data=task", "these settings have no default and were not given: data.task."),
        ("data=task data.task=letters", "data.task is letters; it must be one of digits, "),
        ("data.limit=0", "data.limit is 0; it must be at least 1, or null for all."),
        ("data=files data.sets={b:{task:digits,limit:0}}", "data.sets.b.limit is 0; it must be at least 1"),
        ("data=files", "data.path and data.sets are both missing."),
        ("data=files data.path=a data.sets={b:{path:c}}", "data.path is for a single dataset, and data.sets is given."),
        ("data=files data.sets={b:{weight:2}}", "needs a path or a task, and not both."),
        (
            "data=files data.sets={b:{path:c,wieght:2}}",
            "data.sets.b.wieght is not a setting of a set; did you mean weight?",
        ),
        ("data=files data.sets={b:{path:c,weight:much}}", "data.sets.b.weight: Value 'much' of type 'str' could not"),
        ("data=files data.sets={b:{task:digits,streaming:true}}", "data.sets.b.streaming would do nothing: a task is"),
        ("data=files data.path=", "data.path and data.sets are both missing."),
        ("data=files data.sets={b:c}", "data.sets.b is c; it must be like {path: chats.jsonl, weight: 2}."),
        ("data=files data.path=a data.modality_ratio={sound:1}", "data.modality_ratio has sound; it must be one of"),
        ("data=files data.sets={b:{path:c,weight:2}} data.mix=concat", "the weight of b would do nothing."),
        ("data=files data.path=a data.modality_ratio={text:-1}", "data.modality_ratio.text is -1.0; it must be"),
        ("data.too_long=skip", "expected one of [quarantine, drop_turns, shrink_images]"),
        ("data.max_bad=1", "data.max_bad is 1.0; it must lie in 0..1, 1 excluded."),
        ("data.slow_s=400", "0 < slow_s < dead_s must hold."),
        ("data=files data.path=a data.eval_path=b data.eval_fraction=0.1", "Keep one."),
    ],
)
def test_a_mistake_is_told_in_one_sentence(override, expected):
    told = message(*override.split())
    assert expected in told
    assert "\n" not in told and "full_key" not in told and "$" not in told


def test_a_setting_that_a_recipe_makes_of_other_data_is_told_to_be_its_own():
    said = message("experiment=zoom_rl", "data=files", "data.path=a.jsonl", entry="rl")
    assert said.startswith(
        "experiment=zoom_rl sets data.task, which is not a setting of the chosen data; it belongs to"
    )
    assert "Leave experiment=zoom_rl out" in said and said.endswith("configs/experiment/zoom_rl.yaml.")
    typed = message("experiment=zoom_rl", "data=files", "data.path=a.jsonl", "data.task=zoom", entry="rl")
    assert typed.startswith("data.task is not a setting of the chosen data")


def test_rules_about_length_hold_for_epochs_too():
    config = load("run.epochs=2", "optim.warmup_steps=50")
    with pytest.raises(UserError, match=r"optim.warmup_steps \(50\) .* \(run.epochs=2, 40 updates\)"):
        check_steps(config, 40)


def test_differences_name_what_changes_the_numbers_and_only_that():
    old = plain(load("experiment=digits"))
    free = load(
        *("experiment=digits", "run.folder=elsewhere", "tracker=wandb", "evaluate.every=7", "data.workers=3"),
        *("model.recompute=layers", "model.offload_activations=true"),
    )
    assert differences(old, plain(free)) == {}
    changed = load(
        "experiment=digits", "optim.lr=1", "data.seed=5", "model.config.text_config.moe_k=1", "run.steps=999"
    )
    assert differences(old, plain(changed)) == {
        "data.seed": (0, 5),
        "model.config.text_config.moe_k": (2, 1),
        "optim.lr": (0.002, 1.0),
        "run.steps": (400, 999),
    }


def test_a_run_of_digits_goes_on_under_its_new_name():
    """Its checkpoint says data.kind=digits, and nothing of settings that have been added since."""
    now = plain(load("experiment=digits"))
    old = now | {"data": {key: value for key, value in now["data"].items() if key not in ("task", "limit")}}
    old["data"]["kind"] = "digits"
    assert differences(old, now) == {}
    other = plain(load("experiment=digits", "data.task=counting"))
    assert differences(old, other) == {"data.task": ("digits", "counting")}
    assert differences(old, plain(load("experiment=digits", "data.limit=9"))) == {"data.limit": ("(absent)", 9)}


def test_the_order_of_globs_changes_the_numbers():
    """After the way through state.json, which keeps the order."""
    scales = ["{layers.0.*: 0.5, layers.*: 0.2}", "{layers.*: 0.2, layers.0.*: 0.5}"]
    old, new = (json.loads(json.dumps(plain(load(f"optim.lr_scale={scale}")))) for scale in scales)
    for settings, scale in ((old, [0.5, 0.2]), (new, [0.2, 0.5])):
        assert list(settings["optim"]["lr_scale"].values())[-2:] == scale
    assert differences(old, old) == {}
    assert list(differences(old, new)) == ["optim.lr_scale"]


def test_a_constant_learning_rate_may_go_on_for_longer():
    settings = ["experiment=digits", "optim.schedule=constant"]
    assert differences(plain(load(*settings)), plain(load(*settings, "run.steps=999"))) == {}
    epochs = [*settings, "run.steps=null"]
    assert differences(plain(load(*epochs)), plain(load(*epochs, "run.epochs=3"))) == {}


def test_plain_settings_come_back_the_same():
    config = load("experiment=digits")
    assert plain(config)["model"]["precision"] == "fp32" and plain(config)["data"]["kind"] == "task"


def test_nothing_near_suggests_nothing():
    assert suggestion("zzzzzz", sorted(set(known_keys(SFTConfig)))) == ""


def test_a_typo_in_the_architecture_is_named():
    """model.config is a dictionary without a schema, so Hydra cannot tell."""
    config = load("+model.config.text_config.moe_kk=3")
    with pytest.raises(
        UserError, match=r"model.config.text_config.moe_kk is not .*did you mean model.config.text_config.moe_k\?"
    ):
        read_architecture(config.model, None)


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("model=")])
def test_the_shipped_architectures_hold_no_unknown_key(choice):
    config = load(choice)
    assert read_architecture(config.model, None).to_json()["model_type"] == config.model.config["model_type"]


@pytest.mark.parametrize(
    "setting", ["engine.max_running=0", "agent.max_turns=0", "limits.queue=-1", "sampling.max_new_tokens=many"]
)
def test_settings_of_a_model_at_work_are_told_as_the_others(setting):
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        with pytest.raises((UserError, ConfigCompositionException), match=setting.partition("=")[0]):
            to_typed(compose("serve", overrides=["checkpoint=model", setting]), ServeConfig)
