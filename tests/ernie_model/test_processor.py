"""Conversations to model inputs: ids, placeholders, positions, patches and the author of every token."""

import json
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ernie_model.chat import ChatError, ChatFormat, SpanKind
from ernie_model.checkpoint import CheckpointError
from ernie_model.config import PositionAfterVideo
from ernie_model.images import ImageSettings, MediaError, image_patches
from ernie_model.processor import Processor, token_types
from ernie_model.rope import num_media_tokens, position_ids
from ernie_model.tokenizer import Tokenizer, TokenizerError
from ernie_model.video import Frames, FrameSampling, VideoSettings, draw_timestamp, video_patches

same_fixture = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
LAST = PositionAfterVideo.LAST


def red(height: int, width: int, shade: int = 255) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, 0, 0))


def image(picture) -> dict:
    return {"type": "image", "image": picture}


def text(part: str) -> dict:
    return {"type": "text", "text": part}


def message(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=10)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words},
    optional={
        "reasoning_content": words,
        "tool_calls": st.just([{"function": {"name": "f", "arguments": {"x": [1, "字"]}}}]),
    },
)
others = st.builds(message, st.sampled_from(["system", "user", "tool"]), words)
conversations = st.lists(others | answers, min_size=1, max_size=5)


@pytest.fixture(scope="module")
def saved(processor, vl_config, tmp_path_factory):
    """A checkpoint folder without weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor.save(folder)
    (folder / "config.json").write_text(json.dumps(vl_config.to_json()))
    return folder


@pytest.fixture(scope="module")
def transformers_tokenizer(saved):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(saved)


# ------------------------------------------------------------------------------------------------ ids and placeholders


def test_a_conversation_with_an_image_by_hand(processor):
    """An image of 56 x 84 pixels is 4 x 6 patches, which is 6 tokens."""
    messages = [
        message("user", [text("What is this?"), image(red(56, 84))]),
        message("assistant", "A cat."),
    ]
    encoded = processor.encode(messages)
    picture = "<|IMAGE_START|>" + 6 * "<|IMAGE_PLACEHOLDER|>" + "<|IMAGE_END|>"
    assert processor.decode(encoded.token_T) == (
        f"<|begin_of_sentence|>User: What is this?Picture 1:{picture}\nAssistant: <think>\n\n</think>\n\n"
        "A cat.<|end_of_sentence|>"
    )
    assert encoded.token_T.dtype == encoded.position_3T.dtype == torch.int64
    assert encoded.grids == ((1, 4, 6),)
    wanted_PX, _ = image_patches(red(56, 84), ImageSettings())
    assert torch.equal(encoded.patch_PX, torch.from_numpy(wanted_PX))
    spans = [
        (span.message, span.kind.name, processor.decode(encoded.token_T[span.start : span.stop]))
        for span in encoded.spans
    ]
    assert spans == [
        (-1, "TEMPLATE", "<|begin_of_sentence|>"),
        (0, "TEMPLATE", "User:"),
        (0, "USER", " What is this?"),  # one token holds the space and the word: it belongs to the later part
        (0, "TEMPLATE", "Picture 1:"),
        (0, "IMAGE", picture),
        (1, "TEMPLATE", "\nAssistant: <think>\n\n</think>\n\n"),
        (1, "ANSWER", "A cat."),
        (1, "END", "<|end_of_sentence|>"),
    ]
    assert [span.generated for span in encoded.spans] == [False] * 6 + [True] * 2
    assert [span.prompted for span in encoded.spans] == [False] * 6 + [True] * 2


def test_a_text_conversation_has_no_patches(processor):
    encoded = processor.encode([message("user", "Hi")], add_generation_prompt=True)
    assert encoded.patch_PX is None and encoded.grids == ()
    length = len(encoded.token_T)
    assert encoded.position_3T.tolist() == [list(range(length))] * 3
    assert encoded.spans[-1].message == 1, "the prompt belongs to the message that is to be written"


def test_items_keep_their_order_and_their_pixels(processor):
    """An image, a clip, and an image in a tool's result."""
    frames = Frames([Image.new("RGB", (64, 64), (0, 0, shade)) for shade in (10, 20, 30)], seconds=[0, 1, 2])
    small = Processor(processor.tokenizer, processor.config, video=VideoSettings(min_pixels=3136, max_pixels=3136))
    encoded = small.encode(
        [
            message("user", [image(red(56, 56, 40)), text("and"), {"type": "video", "video": frames}]),
            message("assistant", "", tool_calls=[{"name": "zoom"}]),
            message("tool", [image(red(56, 84, 80)), text("done")]),
        ],
        add_generation_prompt=True,
    )
    assert encoded.grids == ((1, 4, 4), (4, 4, 4), (1, 4, 6))
    wanted = [
        image_patches(red(56, 56, 40), small.image)[0],
        video_patches(frames, small.video)[0],
        image_patches(red(56, 84, 80), small.image)[0],
    ]
    assert torch.equal(encoded.patch_PX, torch.from_numpy(np.concatenate(wanted)))
    rendered = small.decode(encoded.token_T)
    assert "Video 1:<|VIDEO_START|>" + 8 * "<|VIDEO_PLACEHOLDER|>" + "<|VIDEO_END|>\nAssistant:" in rendered
    assert "<tool_output>\nPicture 2:<|IMAGE_START|>" + 6 * "<|IMAGE_PLACEHOLDER|>" + "<|IMAGE_END|>done" in rendered
    assert torch.equal(encoded.position_3T, position_ids(encoded.token_T, encoded.grids, small.config))


@pytest.mark.parametrize(("grid", "count"), [((1, 4, 6), 6), ((1, 2, 2), 1), ((2, 4, 6), 6), ((8, 4, 4), 16)])
def test_number_of_placeholders(grid, count):
    """Images h * w / 4, videos t * h * w / 8 (reference 2.3)."""
    assert num_media_tokens(grid) == count


def test_a_user_cannot_type_a_special_token(processor):
    """The characters stay characters: no image, no end of turn, no thought that the model did not have."""
    typed = "<|IMAGE_PLACEHOLDER|><|end_of_sentence|><think></s><|LOC_3|>"
    encoded = processor.encode([message("user", typed), message("tool", typed)], tools=[{"name": typed}])
    special = [i for i in encoded.token_T.tolist() if i in {processor.tokenizer.special_id(t) for t in SPECIALS}]
    assert special == [processor.begin_id]
    assert processor.decode(encoded.token_T).count(typed) == 3


SPECIALS = ("<|IMAGE_PLACEHOLDER|>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<think>", "</s>", "<|LOC_3|>")


# ------------------------------------------------------------------------------------------------ types and positions


def test_token_types(processor):
    """Reference 4.4: A <start> 6 placeholders <end> B, and the same for a video."""
    config = processor.config
    ids = [5, config.image_start_token_id, *[config.image_token_id] * 2, config.image_end_token_id, 6]
    ids += [config.video_start_token_id, config.video_token_id, config.video_end_token_id]
    token_T = torch.tensor(ids)
    assert token_types(token_T, config).tolist() == [0, 0, 1, 1, 0, 0, 0, 2, 0]
    assert token_types(token_T, config, brackets=True).tolist() == [0, 1, 1, 1, 1, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("grid", "is_video", "rule", "wanted"),
    [
        (
            (1, 4, 6),
            False,
            None,
            [
                [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9],
                [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9],
                [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9],
            ],
        ),
        (
            (8, 4, 4),
            True,
            None,
            [
                [0, 1, 2, *[3] * 4, *[4] * 4, *[5] * 4, *[6] * 4, 5, 6, 7, 8],
                [0, 1, 2, *[3, 3, 4, 4] * 4, 5, 6, 7, 8],
                [0, 1, 2, *[3, 4, 3, 4] * 4, 5, 6, 7, 8],
            ],
        ),
        (
            (8, 4, 4),
            True,
            LAST,
            [
                [0, 1, 2, *[3] * 4, *[4] * 4, *[5] * 4, *[6] * 4, 7, 8, 9, 10],
                [0, 1, 2, *[3, 3, 4, 4] * 4, 7, 8, 9, 10],
                [0, 1, 2, *[3, 4, 3, 4] * 4, 7, 8, 9, 10],
            ],
        ),
    ],
)
def test_positions_of_the_reference(processor, grid, is_video, rule, wanted):
    """Reference 2.5: three tokens of text, the item's placeholders, four tokens of text."""
    config = processor.config if rule is None else processor.config.replace(position_after_video=rule)
    placeholder = config.video_token_id if is_video else config.image_token_id
    token_T = torch.tensor([5] * 3 + [placeholder] * num_media_tokens(grid) + [5] * 4)
    assert position_ids(token_T, [grid], config).tolist() == wanted


# --------------------------------------------------------------------------------------------- what holds in every case


@same_fixture
@given(conversations, st.sampled_from([None, True, False]), st.booleans(), st.booleans())
def test_spans_partition_the_tokens(processor, messages, thinking, add_generation_prompt, every_turn):
    encoded = processor.encode(
        messages, thinking=thinking, add_generation_prompt=add_generation_prompt, every_turn=every_turn
    )
    assert encoded.spans[0].start == 0 and encoded.spans[-1].stop == len(encoded.token_T)
    for left, right in zip(encoded.spans, encoded.spans[1:], strict=False):
        assert left.start < left.stop == right.start < right.stop
        assert left.message <= right.message
    for span in encoded.spans:
        assert not span.prompted or span.generated
        if span.generated:
            assert messages[span.message]["role"] == "assistant"


@same_fixture
@given(conversations, st.sampled_from([None, True, False]))
def test_decoding_gives_the_chat_string_and_encoding_again_the_same_ids(processor, messages, thinking):
    first = processor.encode(messages, thinking=thinking)
    assert processor.decode(first.token_T) == processor.render(messages, thinking=thinking)
    assert torch.equal(processor.encode(messages, thinking=thinking).token_T, first.token_T)


@same_fixture
@given(conversations, st.sampled_from([None, True, False]), st.booleans())
def test_a_conversation_taken_apart_by_its_spans_is_the_conversation(processor, messages, thinking, every_turn):
    """Text of every author -> messages -> the same ids. The assistant shares no token with its prompt."""
    encoded = processor.encode(messages, thinking=thinking, every_turn=every_turn)
    written: dict[int, dict[SpanKind, str]] = {}
    for span in encoded.spans:
        if span.prompted:
            part = processor.decode(encoded.token_T[span.start : span.stop])
            kinds = written.setdefault(span.message, {})
            kinds[span.kind] = kinds.get(span.kind, "") + part
    rebuilt = list(messages)
    for index, kinds in written.items():
        assert kinds.get(SpanKind.ANSWER, "") == messages[index]["content"]
        calls = re.findall("<tool_call>\n(.*)\n</tool_call>", kinds.get(SpanKind.TOOL_CALL, ""))
        reasoning = kinds.get(SpanKind.REASONING, "").removesuffix("\n").removesuffix("\n").removesuffix("</think>")
        rebuilt[index] = message("assistant", kinds.get(SpanKind.ANSWER, ""), reasoning_content=reasoning)
        rebuilt[index]["tool_calls"] = [{"function": json.loads(call)} for call in calls]
    again = processor.encode(rebuilt, thinking=thinking, every_turn=every_turn)
    assert torch.equal(again.token_T, encoded.token_T)


@same_fixture
@given(conversations, answers, st.sampled_from([None, True, False]))
def test_training_tokens_are_prompt_tokens_plus_what_is_sampled(processor, messages, answer, thinking):
    whole = processor.encode([*messages, answer], thinking=thinking)
    thinks = bool((answer.get("reasoning_content") or "").strip("\n")) if thinking is None else thinking
    prompt = processor.encode(messages, thinking=thinks, add_generation_prompt=True)
    length = len(prompt.token_T)
    assert torch.equal(whole.token_T[:length], prompt.token_T)
    own = [span for span in whole.spans if span.message == len(messages) and span.prompted]
    assert (own[0].start, own[-1].stop) == (length, len(whole.token_T))
    assert whole.token_T[-1] == processor.end_id and own[-1].kind is SpanKind.END


@same_fixture
@given(conversations, st.sampled_from([None, True, False]))
def test_prompts_are_what_transformers_makes_of_the_chat_string(processor, transformers_tokenizer, messages, thinking):
    """Byte for byte what a server that renders the template and tokenises the text would feed the model."""
    prompt = processor.encode(messages, thinking=thinking, add_generation_prompt=True)
    theirs = transformers_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
    )
    assert prompt.token_T.tolist() == theirs


def test_history_is_tokenised_in_one_piece_and_what_is_written_is_not(processor):
    """As history "Assistant: They" holds the token " They"; being written, the prompt ends before "They"."""
    tokens = processor.tokenizer

    def names(messages, **options):
        return [tokens.token(i) for i in processor.encode(messages, **options).token_T.tolist()]

    history = [message("user", "?"), message("assistant", "They")]
    assert "\u2581They" in names(history, add_generation_prompt=True)
    plain = Processor(tokens, processor.config, chat=ChatFormat(think=False))
    ids = plain.encode(history).token_T.tolist()
    assert [tokens.token(i) for i in ids][-4:] == [":", "\u2581", "They", "<|end_of_sentence|>"]


# -------------------------------------------------------------------------------------------------------------- errors


def test_media_that_cannot_be_honoured_are_named(processor, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for part, name in (
        (image(tmp_path / "broken.png"), r"broken\.png"),
        (image(b"no picture"), r"image 1 of the conversation \(message 1\)"),
        (image(red(1, 201)), r"image 1 of the conversation \(message 1\)"),
        ({"type": "video", "video": tmp_path / "gone.mp4"}, r"gone\.mp4"),
        ({"type": "video", "video": b"no film"}, r"video 1 of the conversation \(message 1\)"),
        ({"type": "video", "video": Frames([])}, r"video 1 of the conversation \(message 1\)"),
    ):
        with pytest.raises(MediaError, match=name):
            processor.encode([message("system", "S"), message("user", [text("Look:"), part])])


def test_a_text_model_refuses_media(tokenizer, vl_config):
    config = vl_config.replace(vision=None, mrope_section=None, vision_expert_width=0)
    processor = Processor(tokenizer, config)
    with pytest.raises(ChatError, match="message 0 holds an image, but this is a text model"):
        processor.encode([message("user", [image(red(56, 56))])])
    encoded = processor.encode([message("user", "Hi")], tools=[{"name": "f"}])
    assert "\n\n<tool_list>" in processor.decode(encoded.token_T)
    assert token_types(encoded.token_T, config).sum() == 0


def test_a_tokenizer_that_does_not_fit_the_configuration_is_refused(tokenizer, vl_config):
    with pytest.raises(TokenizerError, match=r"image_token_id in config.json is 7.*is 1034"):
        Processor(tokenizer, vl_config.replace(image_token_id=7))
    with pytest.raises(TokenizerError, match="ids up to 2047, but vocab_size in config.json is 2000"):
        Processor(tokenizer, vl_config.replace(vocab_size=2000))


def test_a_video_placeholder_that_only_the_configuration_knows_is_used(tokenizer, vl_config):
    """Baidu's own tokenizer has no video placeholder; the id in config.json is an unused row (reference 1.3)."""
    raw = json.loads(tokenizer.files["tokenizer.json"])
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<|VIDEO_PLACEHOLDER|>"]
    without = Tokenizer(tokenizer.files | {"tokenizer.json": json.dumps(raw)})
    assert without.special_id("<|VIDEO_PLACEHOLDER|>") is None
    processor = Processor(without, vl_config, video=VideoSettings(min_pixels=784, max_pixels=784))
    encoded = processor.encode([message("user", [{"type": "video", "video": Frames([red(28, 28)] * 2)}])])
    assert (encoded.token_T == vl_config.video_token_id).sum() == 1


# ------------------------------------------------------------------------------------------------------- save and load


def test_saved_and_loaded_it_does_the_same(processor, vl_config, saved):
    again = Processor.from_pretrained(saved)
    assert (again.config, again.image, again.chat) == (processor.config, processor.image, processor.chat)
    messages = [message("user", [image(red(60, 90)), {"type": "video", "video": Frames([red(60, 90)] * 3)}, text("?")])]
    assert again.video.font == saved / "Aileron-Regular.ttf"
    ours, theirs = processor.encode(messages), again.encode(messages)
    assert torch.equal(ours.token_T, theirs.token_T)
    assert torch.equal(ours.patch_PX, theirs.patch_PX), "the saved font must draw what the built-in font draws"


def test_settings_survive_saving(tokenizer, vl_config, tmp_path):
    processor = Processor(
        tokenizer,
        vl_config,
        ImageSettings(min_pixels=784, max_pixels=7840, mean=(0.1, 0.2, 0.3)),
        VideoSettings(sampling=FrameSampling.TRANSFORMERS, num_frames=20, draw_timestamps=False, max_frames=30),
        ChatFormat(think=False),
    )
    processor.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vl_config.to_json()))
    assert not (tmp_path / "Aileron-Regular.ttf").exists()
    again = Processor.from_pretrained(tmp_path)
    assert (again.image, again.video, again.chat) == (processor.image, processor.video, processor.chat)


def test_transformers_reads_the_saved_image_settings(processor, saved):
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    theirs = Ernie4_5_VLMoeImageProcessorPil.from_pretrained(saved)(images=[red(60, 90)], return_tensors="np")
    ours = processor.encode([message("user", [image(red(60, 90))])])
    assert theirs["image_grid_thw"].tolist() == [list(ours.grids[0])]
    np.testing.assert_allclose(ours.patch_PX.numpy(), theirs["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="transformers' ERNIE processor needs torchvision")
def test_transformers_processor_makes_the_same_inputs(processor, saved):
    from transformers import AutoProcessor

    theirs = AutoProcessor.from_pretrained(saved)
    clip = np.random.default_rng(0).integers(0, 256, (40, 240, 320, 3), dtype=np.uint8)
    frames = Frames([Image.fromarray(frame) for frame in clip], fps=10)
    messages = [message("user", [image(red(60, 90)), {"type": "video", "video": frames}, text("What is 42?")])]
    sampling = VideoSettings(sampling=FrameSampling.TRANSFORMERS, fps=2)
    ours = Processor(processor.tokenizer, processor.config, video=sampling).encode(messages, add_generation_prompt=True)
    out = theirs(
        text=[processor.render(messages, add_generation_prompt=True)],
        images=[red(60, 90)],
        videos=[clip.copy()],
        videos_kwargs={"video_metadata": [{"total_num_frames": 40, "fps": 10.0, "duration": 4.0}], "fps": 2},
        return_tensors="pt",
    )
    assert out["input_ids"][0].tolist() == ours.token_T.tolist()
    assert out["image_grid_thw"].tolist() + out["video_grid_thw"].tolist() == [list(grid) for grid in ours.grids]
    assert torch.equal(out["mm_token_type_ids"][0], token_types(ours.token_T, processor.config))
    assert torch.equal(out["moe_mm_token_type_ids"][0], token_types(ours.token_T, processor.config, brackets=True))
    # torchvision resizes 8-bit pixels a little differently from PIL: one or two steps of 1 / 255 / 0.26 (trap 7.17).
    patch_PX = torch.cat([out["pixel_values"], out["pixel_values_videos"]])
    assert (patch_PX - ours.patch_PX).abs().max() < 2.5 / 255 / 0.26


def test_settings_as_transformers_writes_them_are_read(saved, vl_config, tmp_path):
    """transformers 5 puts both preprocessors into processor_config.json."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    size = {"shortest_edge": 784, "longest_edge": 78400}
    nested = {
        "image_processor": {"size": size},
        "video_processor": {"size": size, "fps": None, "max_frames": 20, "draw_on_frames": False},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    processor = Processor.from_pretrained(tmp_path)
    assert processor.image == ImageSettings(min_pixels=784, max_pixels=78400)
    assert processor.video == VideoSettings(min_pixels=784, max_pixels=78400, max_frames=20, draw_timestamps=False)


def test_the_checkpoint_s_own_font_and_template_are_honoured(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "video_preprocessor_config.json").unlink()
    (tmp_path / "Roboto-Regular.ttf").write_bytes((saved / "Aileron-Regular.ttf").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ '\nAssistant: ' }}")
    processor = Processor.from_pretrained(tmp_path)
    assert processor.video.font == tmp_path / "Roboto-Regular.ttf"
    assert processor.chat.think is False
    processor.save(tmp_path / "again")
    assert (tmp_path / "again" / "Roboto-Regular.ttf").exists()
    assert (
        json.loads((tmp_path / "again" / "video_preprocessor_config.json").read_text())["font"] == "Roboto-Regular.ttf"
    )


def test_limits_in_the_style_of_baidu_are_not_read(saved, tmp_path):
    """Their files state min_pixels and max_pixels, their processors use others (reference 4.1)."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 6272, "max_pixels": 1003520}))
    assert Processor.from_pretrained(tmp_path).image == ImageSettings()


def test_a_hub_name_downloads_no_weights(saved, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    processor = Processor.from_pretrained("baidu/ERNIE-4.5-VL-28B-A3B-PT", revision="main")
    assert processor.tokenizer.vocab_size == 2048
    assert (asked["name"], asked["revision"]) == ("baidu/ERNIE-4.5-VL-28B-A3B-PT", "main")
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_a_processor_is_found_wherever_weights_are(saved, monkeypatch):
    """The same spellings as `load_model` takes: model.checkpoint names both."""
    monkeypatch.setenv("HOME", str(saved.parent))
    for source in (f"~/{saved.name}", saved / "config.json"):
        assert Processor.from_pretrained(source).tokenizer.vocab_size == 2048


@pytest.mark.parametrize("source", ["./nothing", "a/b/c", "nothing"])
def test_a_source_that_is_nothing_is_named(source):
    with pytest.raises(CheckpointError, match=f"'{source}' is neither an existing folder nor a hub id"):
        Processor.from_pretrained(source)


def test_stamps_reach_the_patches(processor):
    frame = red(240, 320)
    encoded = processor.encode([message("user", [{"type": "video", "video": Frames([frame], seconds=[65.0])}])])
    wanted_PX, _ = image_patches(draw_timestamp(frame, 65.0), processor.video)
    assert np.array_equal(encoded.patch_PX[: len(wanted_PX)].numpy(), wanted_PX)


def test_generation_stops_where_a_turn_ends(saved, processor, vl_config):
    """transformers and vLLM read the stop tokens from generation_config.json; config.json names only </s>."""
    ends = json.loads((saved / "generation_config.json").read_text())
    end_of_turn = processor.tokenizer.require("<|end_of_sentence|>")
    assert ends["eos_token_id"] == sorted([vl_config.eos_token_id, end_of_turn])


# ------------------------------------------------------------------------------------------------------- continuations


def test_a_continuation_by_hand(processor):
    results = [
        message("tool", [image(red(56, 56)), text("a label")]),
        message("tool", "error: no"),
        message("user", [image(red(56, 84)), text("And now?")]),
    ]
    encoded = processor.encode_continuation(results, images_before=2, videos_before=1, thinking=True)
    assert re.sub(r"(<\|IMAGE_PLACEHOLDER\|>)+", "@", processor.decode(encoded.token_T)) == (
        "User: \n<tool_output>\nPicture 3:<|IMAGE_START|>@<|IMAGE_END|>a label\n</tool_output>\n"
        "<tool_output>\nerror: no\n</tool_output>\n"
        "User: Picture 4:<|IMAGE_START|>@<|IMAGE_END|>And now?\nAssistant: <think>"
    )
    assert encoded.grids == ((1, 4, 4), (1, 4, 6))
    assert not any(span.generated for span in encoded.spans)


thoughts = st.builds(
    message,
    st.just("assistant"),
    words,
    reasoning_content=words.filter(lambda word: word.strip("\n")),
    tool_calls=st.sampled_from([[], [{"function": {"name": "f", "arguments": {"x": [1, "字"]}}}]]),
)
shown = st.lists(st.just(image(red(56, 56))) | words.map(text), min_size=1, max_size=3)
said = st.lists(st.builds(message, st.sampled_from(["user", "tool"]), shown | words), min_size=1, max_size=3)


@same_fixture
@given(rounds=st.lists(st.tuples(said, thoughts), min_size=1, max_size=3), rest=said, thinking=st.booleans())
def test_turns_and_continuations_end_to_end_are_the_whole_conversation(processor, rounds, rest, thinking):
    """With reasoning in every turn, as the Thinking releases write it."""
    history = [part for others, turn in rounds for part in (*others, turn)]
    whole = processor.encode([*history, *rest], add_generation_prompt=True, thinking=thinking)
    begun = processor.encode(history)
    images = sum(
        part["type"] == "image" for turn in history if isinstance(turn["content"], list) for part in turn["content"]
    )
    more = processor.encode_continuation(rest, images_before=images, videos_before=0, thinking=thinking)
    assert whole.token_T.tolist() == begun.token_T.tolist() + more.token_T.tolist()
    assert whole.grids == begun.grids + more.grids


@pytest.mark.parametrize("thinking", [False, True])
def test_without_reasoning_a_continuation_shows_turns_as_training_does(processor, thinking):
    """`every_turn` is how data is trained by default: each turn behind its generation prompt."""
    history = [message("user", "Hi"), message("assistant", "Hello.")]
    rest = [message("user", "And?")]
    whole = processor.encode(
        [*history, *rest, message("assistant", "")], every_turn=True, thinking=thinking
    ).token_T.tolist()
    begun = processor.encode(history, every_turn=True, thinking=thinking).token_T.tolist()
    more = processor.encode_continuation(rest, images_before=0, videos_before=0, thinking=thinking).token_T.tolist()
    assert whole[: len(begun) + len(more)] == begun + more


@pytest.mark.parametrize("thinking", [False, True])
def test_an_answer_of_several_turns_is_the_ids_that_were_sampled_one_after_another(processor, thinking):
    """What an agent's engine has in its row: the prompt, a turn, a result behind it, the next turn."""
    history = [message("user", "Hi"), message("assistant", "Hello."), message("user", "And?")]
    turns, result = [message("assistant", "I look."), message("assistant", "A cat.")], [message("tool", "cat")]
    whole = processor.encode([*history, turns[0], *result, turns[1]], written_from=3, thinking=thinking).token_T

    ids = processor.encode(history, add_generation_prompt=True, thinking=thinking).token_T.tolist()
    for number, turn in enumerate(turns):
        if number:
            more = processor.encode_continuation(result, images_before=0, videos_before=0, thinking=thinking)
            ids += more.token_T.tolist()
        alone = processor.encode([message("user", "x"), turn], thinking=thinking)
        ids += [id for span in alone.spans if span.generated for id in alone.token_T[span.start : span.stop].tolist()]
    assert whole.tolist() == ids


@pytest.mark.parametrize("messages", [[], [message("assistant", "I go on.")]])
def test_a_continuation_of_nothing_or_of_the_assistant_itself_is_refused(processor, messages):
    with pytest.raises(ChatError, match="no message|assistant"):
        processor.encode_continuation(messages, images_before=0, videos_before=0)


def test_a_picture_of_a_continuation_is_counted_from_the_beginning_when_it_is_refused(processor):
    with pytest.raises(MediaError, match="image 4 of the conversation"):
        processor.encode_continuation([message("tool", [image(b"?")])], images_before=2, videos_before=1)
