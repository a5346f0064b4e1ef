"""Messages with images and videos -> what the model takes; and back to text.

    messages --chat.py--> pieces --tokenizer.py--> ids with the author of each
                            |                        ^
                         images, videos --------> placeholders, one per feature the resampler will make
                            '----images.py, video.py----> patch_PX, grids

    token_T   <bos> User: ... Picture 1: <START> <IMG> <IMG> <IMG> <IMG> <END> ... Assistant: <think> .. | 7 <end>
    spans     |template |user |template |           image            |user| template                |answer|end|

Adjacent plain text is tokenised as one run, across pieces, so that ids equal those of the whole chat string; except
that a run ends where the assistant begins to write: what it writes is then tokenised as it would be sampled, behind the
ids of its prompt. A token of a run that straddles two spans belongs to the later one.

Shape letters:  T tokens   P patches   X numbers in a patch
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernie_model.atomic import atomic_write
from ernie_model.chat import (
    ChatError,
    ChatFormat,
    Piece,
    PieceKind,
    SpanKind,
    jinja_template,
    render,
    render_continuation,
    to_text,
)
from ernie_model.checkpoint import CheckpointError, local_folder
from ernie_model.config import ErnieConfig
from ernie_model.images import (
    CLIP_MEAN,
    CLIP_STD,
    ImageSettings,
    ImageSize,
    KnownGrid,
    image_patches,
    load_image,
    resized_size,
)
from ernie_model.rope import Grid, num_media_tokens, position_ids
from ernie_model.tokenizer import BEGIN_OF_SENTENCE, END_OF_SENTENCE, MEDIA_TOKENS, Tokenizer, TokenizerError
from ernie_model.video import ClipChoice, Frames, FrameSampling, VideoSettings, file_name, font_file, video_patches

IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_FONT = "Roboto-Regular.ttf"


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of one author."""

    start: int
    stop: int
    message: int
    """Index into the messages; -1 before the first, len(messages) in the generation prompt."""
    kind: SpanKind
    prompted: bool = False
    """The tokens stand behind their generation prompt, as at inference (chat.py explains which turns do)."""

    @property
    def generated(self) -> bool:
        """Written by an assistant: reasoning, text, tool calls and the closing `<|end_of_sentence|>`."""
        return self.kind.generated


@dataclass(frozen=True)
class Encoded:
    token_T: Tensor  # int64
    position_3T: Tensor  # int64; rows time, height, width
    patch_PX: Tensor | None  # float32; all images and videos end to end; None without media
    grids: tuple[Grid, ...]
    """(frames, rows, columns) in patches of each image (1 frame) and video, in order of appearance."""
    spans: tuple[Span, ...]
    """In order; they cover 0..T without gaps."""


class Processor:
    """Everything between a conversation and the model's inputs. Holds no state: threads may share it.

    Raises:
        TokenizerError: the tokenizer lacks a token of the chat format, or disagrees with the configuration.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ErnieConfig,
        image: ImageSettings | None = None,
        video: VideoSettings | None = None,
        chat: ChatFormat | None = None,
    ):
        self.tokenizer = tokenizer
        self.config = config
        self.image = image or ImageSettings()
        self.video = video or VideoSettings()
        self.chat = chat or ChatFormat(text_model=config.vision is None)
        self.begin_id = tokenizer.require(BEGIN_OF_SENTENCE)
        self.end_id = tokenizer.require(END_OF_SENTENCE)
        _check_ids(tokenizer, config)

    # ------------------------------------------------------------------------------------------------------- encode

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = False,
        every_turn: bool = False,
        written_from: int | None = None,
    ) -> Encoded:
        """Tokens, positions, patches and spans of one conversation.

        Args:
            messages: OpenAI-style dictionaries; a content is a text or a list of `{"type": "text", "text": str}`,
                `{"type": "image", "image": PIL image, path, bytes, ImageSize or KnownGrid}`,
                `{"type": "video", "video": path, bytes, Frames or KnownGrid, "sampling"?: fields of `ClipChoice`}`.
            tools, thinking, add_generation_prompt, every_turn, written_from: see `chat.render`.

        Raises:
            ChatError: messages that the chat format cannot express.
            MediaError: an image or video that cannot be honoured; it names the file.
        """
        return self._encode(self._render(messages, tools, thinking, add_generation_prompt, every_turn, written_from))

    def encode_continuation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        images_before: int,
        videos_before: int,
        thinking: bool | None = None,
    ) -> Encoded:
        """What follows the `<|end_of_sentence|>` of an assistant's turn, up to where it writes the next one.

        A conversation goes on with the ids that were sampled; nothing of it is tokenised again. When the turns before
        hold their reasoning, or stand behind their generation prompts (`every_turn`), earlier ids and these together
        are what `encode` makes of the whole.

        Args:
            messages: results of tools and what the user says next (`chat.render_continuation`).
            images_before, videos_before: how many the conversation holds already; labels go on from there.

        Returns:
            Positions count from 0; `rope.position_ids` of the whole sequence gives those in their place.

        Raises:
            ChatError, MediaError: as `encode`.
        """
        pieces = render_continuation(
            messages,
            images_before=images_before,
            videos_before=videos_before,
            thinking=thinking,
            chat_format=self.chat,
        )
        return self._encode(pieces, media_before=images_before + videos_before)

    def _encode(self, pieces: Sequence[Piece], media_before: int = 0) -> Encoded:
        ids: list[int] = []
        owner: list[int] = []  # index of the piece each token belongs to
        run: list[int] = []  # indices of adjacent text pieces, not yet tokenised
        patches: list[np.ndarray] = []
        grids: list[Grid] = []

        def finish_run() -> None:
            new_ids, part = self.tokenizer.encode_parts([pieces[i].text for i in run])
            ids.extend(new_ids)
            owner.extend(run[p] for p in part)
            run.clear()

        for index, piece in enumerate(pieces):
            if piece.starts_generation:
                finish_run()
            if piece.kind in (PieceKind.IMAGE, PieceKind.VIDEO):
                finish_run()
                patch_PX, grid = self._media(piece, number=media_before + len(grids) + 1)
                patches.append(patch_PX)
                grids.append(grid)
                new_ids = self._media_ids(piece.kind, grid)
            elif (special := self._special(piece)) is not None:
                finish_run()
                new_ids = [special]
            else:
                run.append(index)
                continue
            ids.extend(new_ids)
            owner.extend([index] * len(new_ids))
        finish_run()

        token_T = torch.tensor(ids, dtype=torch.int64)
        return Encoded(
            token_T=token_T,
            position_3T=position_ids(token_T, grids, self.config),
            patch_PX=torch.from_numpy(patches[0] if len(patches) == 1 else np.concatenate(patches))
            if patches
            else None,
            grids=tuple(grids),
            spans=_spans(pieces, owner),
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = False,
        every_turn: bool = False,
    ) -> str:
        """The chat string, with one placeholder for each image and video; nothing is opened."""
        return to_text(self._render(messages, tools, thinking, add_generation_prompt, every_turn))

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special: bool = False) -> str:
        """The text of `ids`, placeholders and other special tokens included unless `skip_special`."""
        return self.tokenizer.decode(ids.tolist() if isinstance(ids, Tensor) else list(ids), skip_special=skip_special)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool | None,
        add_generation_prompt: bool,
        every_turn: bool,
        written_from: int | None = None,
    ) -> list[Piece]:
        return render(
            messages,
            tools=tools,
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            every_turn=every_turn,
            written_from=written_from,
            chat_format=self.chat,
        )

    def _special(self, piece: Piece) -> int | None:
        return self.tokenizer.special_id(piece.text) if piece.kind is PieceKind.SPECIAL else None

    def _media(self, piece: Piece, number: int) -> tuple[np.ndarray, Grid]:
        if self.config.vision is None:
            raise ChatError(
                f"message {piece.message} holds an {piece.kind.value}, but this is a text model. Use a "
                "vision-language checkpoint, or leave media out."
            )
        if isinstance(piece.media, KnownGrid):
            settings = self.image if piece.kind is PieceKind.IMAGE else self.video
            return np.empty((0, 3 * settings.patch_size**2), np.float32), piece.media.grid
        unnamed = f"{piece.kind.value} {number} of the conversation (message {piece.message})"
        if piece.kind is PieceKind.IMAGE:
            name = str(piece.media) if isinstance(piece.media, str | Path) else None
            name = name or getattr(piece.media, "filename", "") or unnamed
            if isinstance(piece.media, ImageSize):
                height, width = resized_size(piece.media, self.image, name)
                patch = self.image.patch_size
                return np.empty((0, 3 * patch * patch), np.float32), (1, height // patch, width // patch)
            return image_patches(load_image(piece.media, name), self.image, name)
        media = piece.media
        name = media.name if isinstance(media, Frames) else file_name(media)
        try:
            choice = ClipChoice(**piece.sampling or {})
        except TypeError as error:
            raise ChatError(f"message {piece.message}: `sampling` of a video: {error}.") from error
        return video_patches(media, self.video, unnamed if name in ("video", "frames") else name, choice)

    def _media_ids(self, kind: PieceKind, grid: Grid) -> list[int]:
        """Start token, one placeholder for each feature the resampler makes of `grid`, end token."""
        config = self.config
        count = num_media_tokens(grid)
        if kind is PieceKind.IMAGE:
            start, placeholder, end = config.image_start_token_id, config.image_token_id, config.image_end_token_id
        else:
            start, placeholder, end = config.video_start_token_id, config.video_token_id, config.video_end_token_id
        assert start is not None and placeholder is not None and end is not None
        return [start, *[placeholder] * count, end]

    # ------------------------------------------------------------------------------------------------ load and save

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> "Processor":
        """Read the processor of a checkpoint: a local folder, or the name of a repository on the Hugging Face hub.

        Of a repository, only the tokenizer, the JSON files and the font are downloaded.

        Raises:
            CheckpointError: `source` is neither a folder nor a repository that can be reached, or is laid out for vLLM.
            TokenizerError: no tokenizer.json, or one that does not fit the configuration.
            ConfigError: see `ErnieConfig.load`.
        """
        folder = local_folder(source, revision, ["*.json", "*.jinja", "*.ttf", "tokenizer.model"])
        config = ErnieConfig.load(folder)
        return cls(
            Tokenizer.load(folder),
            config,
            _read_image_settings(folder),
            _read_video_settings(folder),
            _read_chat_format(folder, config),
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer, chat template and preprocessing settings into a folder, as transformers reads them.

        The chat template is always the one this processor renders, whatever the checkpoint came with: what is served
        must be what was trained. `config.json` belongs to the model (`checkpoint.save_model`).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        # A turn ends with <|end_of_sentence|>, a document with </s>; the released models may write either (reference
        # 4.5). Without this file transformers and vLLM know only the one of config.json and never stop after a turn.
        stops = sorted({self.end_id, *([] if self.config.eos_token_id is None else [self.config.eos_token_id])})
        ends = {"bos_token_id": self.config.bos_token_id, "pad_token_id": self.config.pad_token_id}
        _write_json(folder / GENERATION_FILE, ends | {"eos_token_id": stops})
        atomic_write(folder / CHAT_TEMPLATE_FILE, jinja_template(self.chat))
        if self.config.vision is None:
            return
        font_name, font = font_file(self.video) if self.video.draw_timestamps else (None, None)
        if font_name is not None and font is not None:
            atomic_write(folder / font_name, font)
        image = _image_json(self.image)
        _write_json(folder / IMAGE_FILE, image)
        _write_json(folder / VIDEO_FILE, _video_json(self.video, font_name))
        _write_json(folder / PROCESSOR_FILE, {"processor_class": PROCESSOR_CLASS})


GENERATION_FILE = "generation_config.json"
VLLM_FRAME_LIMITS = "frame_size"
"""In `IMAGE_FILE` of a folder that is laid out for vLLM (train/vllm_layout.py), and of no other."""
PROCESSOR_CLASS = "Ernie4_5_VLMoeProcessor"


def token_types(token_T: Tensor, config: ErnieConfig, *, brackets: bool = False) -> Tensor:
    """int64 (T,): 0 text, 1 image, 2 video.

    Placeholders only, as for positions (`mm_token_type_ids` of transformers); with `brackets` also the start and end
    tokens, as for the choice of experts (`moe_mm_token_type_ids`). Reference 4.4.
    """
    type_T = torch.zeros_like(token_T)
    if config.vision is None:
        return type_T
    images, videos = [config.image_token_id], [config.video_token_id]
    if brackets:
        images += [config.image_start_token_id, config.image_end_token_id]
        videos += [config.video_start_token_id, config.video_end_token_id]
    for value, token_ids in ((1, images), (2, videos)):
        for token_id in token_ids:
            type_T[token_T == token_id] = value
    return type_T


def _spans(pieces: Sequence[Piece], owner: Sequence[int]) -> tuple[Span, ...]:
    """Merge neighbouring tokens of the same message and kind."""
    spans: list[Span] = []
    for position, index in enumerate(owner):
        piece = pieces[index]
        key = (piece.message, piece.span, piece.prompted)
        last = spans[-1] if spans else None
        if last and (last.message, last.kind, last.prompted) == key:
            spans[-1] = Span(last.start, position + 1, *key)
        else:
            spans.append(Span(position, position + 1, *key))
    return tuple(spans)


def _check_ids(tokenizer: Tokenizer, config: ErnieConfig) -> None:
    """The tokenizer and config.json must mean the same tokens: a wrong id would train text as pixels."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{tokenizer.source} has ids up to {tokenizer.vocab_size - 1}, but vocab_size in config.json is "
            f"{config.vocab_size}; they belong to different models."
        )
    if config.vision is None:
        return
    for field, string in MEDIA_TOKENS.items():
        wanted, found = getattr(config, field), tokenizer.special_id(string)
        # Baidu's own files have no video placeholder: transformers' converter gave it an unused id (reference 1.3).
        if found is not None and found != wanted:
            raise TokenizerError(
                f"{field} in config.json is {wanted}, but {string!r} is {found} in {tokenizer.source}. Set {field}="
                f"{found}, or use the tokenizer that belongs to the model."
            )


# ------------------------------------------------------------------------------------- settings <-> transformers' JSON


def _image_json(settings: ImageSettings) -> dict[str, Any]:
    return dict(
        image_processor_type="Ernie4_5_VLMoeImageProcessor",
        processor_class=PROCESSOR_CLASS,
        **_pixel_json(settings),
        temporal_patch_size=1,
    )


def _video_json(settings: VideoSettings, font_name: str | None) -> dict[str, Any]:
    return dict(
        video_processor_type="Ernie4_5_VLMoeVideoProcessor",
        processor_class=PROCESSOR_CLASS,
        **_pixel_json(settings),
        temporal_patch_size=2,
        do_sample_frames=True,
        # transformers knows one sampling rule; ours is kept under a key of our own, and `fps` makes theirs come close.
        frame_sampling=settings.sampling.value,
        fps=_fps_for_transformers(settings),
        num_frames=settings.num_frames,
        min_frames=settings.min_frames,
        max_frames=settings.max_frames,
        draw_on_frames=settings.draw_timestamps,
        font=font_name,
    )


def _fps_for_transformers(settings: VideoSettings) -> float | None:
    if settings.sampling is FrameSampling.TWO_FPS and settings.num_frames is None:
        return settings.fps or 2.0
    return settings.fps


def _pixel_json(settings: ImageSettings | VideoSettings) -> dict[str, Any]:
    return dict(
        # Names of transformers; both are areas in pixels.
        size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        patch_size=settings.patch_size,
        merge_size=settings.merge_size,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        resample=3,  # bicubic
        rescale_factor=1 / 255,
        do_convert_rgb=True,
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text("utf-8")) if (folder / name).exists() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def _read_image_settings(folder: Path) -> ImageSettings:
    raw = _read_json(folder, IMAGE_FILE) or _read_json(folder, PROCESSOR_FILE).get("image_processor", {})
    if VLLM_FRAME_LIMITS in raw:
        raise CheckpointError(
            f"{folder} is an export with layout=vllm, which is for vLLM and lacks the settings of videos; name one "
            "with layout=hub."
        )
    return ImageSettings(**_pixel_settings(raw))


def _read_video_settings(folder: Path) -> VideoSettings:
    raw = _read_json(folder, VIDEO_FILE) or _read_json(folder, PROCESSOR_FILE).get("video_processor", {})
    settings = _pixel_settings(raw)
    for key in ("fps", "num_frames", "min_frames", "max_frames"):
        if raw.get(key) is not None:
            settings[key] = raw[key]
    if "frame_sampling" in raw:
        settings["sampling"] = FrameSampling(raw["frame_sampling"])
    settings["draw_timestamps"] = raw.get("draw_on_frames", True)
    font = folder / Path(raw.get("font") or DEFAULT_FONT).name
    return VideoSettings(**settings, font=font if font.is_file() else None)


def _pixel_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Only what the file states; the family's defaults stand for the rest.

    Baidu's own files state `min_pixels` and `max_pixels` too, but Baidu's processors take the limits from elsewhere
    (reference 4.1), so these two are not read.
    """
    settings: dict[str, Any] = {}
    size = raw.get("size") or {}
    renamed = dict(min_pixels=size.get("shortest_edge"), max_pixels=size.get("longest_edge"))
    renamed |= dict(patch_size=raw.get("patch_size"), merge_size=raw.get("merge_size"))
    settings |= {key: value for key, value in renamed.items() if value is not None}
    settings["mean"] = tuple(raw.get("image_mean") or CLIP_MEAN)
    settings["std"] = tuple(raw.get("image_std") or CLIP_STD)
    return settings


def _read_chat_format(folder: Path, config: ErnieConfig) -> ChatFormat:
    """Does the checkpoint's own template know thinking? Without a template, the family's default: it does."""
    template = _read_json(folder, "tokenizer_config.json").get("chat_template") or ""
    if (folder / CHAT_TEMPLATE_FILE).exists():
        template = (folder / CHAT_TEMPLATE_FILE).read_text("utf-8")
    return ChatFormat(think=not template or "<think>" in str(template), text_model=config.vision is None)
