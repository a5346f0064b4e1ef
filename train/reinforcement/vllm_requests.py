"""One request in vLLM's words, and its answer in ours. Whatever does not come back as it was meant raises.

    ours    ... IMAGE_START P P P P P P IMAGE_END ...      + patches (P, X) and a grid
    theirs  ... IMAGE_START <|image@placeholder|> IMAGE_END ...   + a PNG; the server says what it made of it: the ids

vLLM takes pictures, not patches. A picture is put together again from its patches, pixel by pixel, in the size that
they were cut in; resizing leaves that size alone, so both sides cut the same patches. That is checked here for every
picture, and the server's ids for every prompt.

Source: vLLM 0.32, entrypoints/scale_out/token_in_token_out/protocol.py.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ernie_model.images import PixelSettings, picture_patches, pictures, smart_resize
from ernie_model.inference.entry import Request
from ernie_model.inference.request import Completion, Finish, MediaItem, RequestError, SamplingParams
from ernie_model.processor import Processor
from train.config import UserError

NOTHING = -9000.0
"""vLLM writes -9999 for a log-probability of minus infinity, or of no number."""
COLDEST = 0.01
"""vLLM raises lower temperatures to it."""


class VLLMError(UserError):
    """vLLM does something else than what it was asked, or cannot go on."""


class StaleWeights(Exception):
    """The answer was sampled, in part at least, with weights that this run has not pushed."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Ids in a vLLM prompt that stand for a whole image or video."""

    image: int
    video: int


# ---------------------------------------------------------------------------------------------------------- there


def check_params(params: SamplingParams) -> None:
    """
    Raises:
        RequestError: vLLM does not have it, or has something else under that name.
    """
    plain = SamplingParams()
    for name in ("constraint", "routed_experts", "prompt_logprobs", "top_logprobs"):
        if getattr(params, name) != getattr(plain, name):
            _refuse(name, getattr(params, name), "leave it out")
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        if getattr(params, name) != getattr(plain, name):
            _refuse(name, getattr(params, name), f"set {getattr(plain, name):g}: vLLM applies it in another place")
    if 0 < params.temperature < COLDEST:
        _refuse("temperature", params.temperature, f"set 0, or at least {COLDEST:g}: vLLM would take that instead")
    if params.min_p > 0 and params.top_p < 1:
        _refuse("min_p", params.min_p, "leave it out, or set top_p=1: vLLM applies min_p before top_p, and we after it")


def _refuse(name: str, value: object, way_out: str) -> None:
    raise RequestError(f"{name} is {value}, which cannot be had with rollout.backend=vllm; {way_out}.")


def to_body(request: Request, params: SamplingParams, processor: Processor, places: Places | None) -> dict[str, Any]:
    """What /inference/v1/generate is sent.

    Raises:
        VLLMError: a picture that vLLM would resize.
    """
    ends = [*params.stop_ids]
    if not params.ignore_end:
        ends += request.sampler.vocabulary.terminators
    sampling: dict[str, Any] = {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "logprobs": 0,  # the sampled token's
        # What ends an answer is said here, whatever the server's generation_config.json says.
        "ignore_eos": True,
        "stop_token_ids": sorted(set(ends)),
        "detokenize": bool(params.stop),
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    if params.stop:
        sampling["stop"] = list(params.stop)
    if params.seed is not None:
        sampling["seed"] = params.seed
    bias = {str(token): value for token, value in params.logit_bias.items()}
    bias |= {str(token): -1e9 for token in params.banned_ids}
    if bias:
        sampling["logit_bias"] = bias
    body: dict[str, Any] = {
        "token_ids": list(request.tokens),
        "sampling_params": sampling,
        "return_token_ids": True,
    }
    if request.spans:
        assert places is not None
        body |= _with_media(request, processor, places)
    return body


def _with_media(request: Request, processor: Processor, places: Places) -> dict[str, Any]:
    ids, parts, at = [], [], 0
    for span in request.spans:
        video = request.tokens[span.start - 1] == processor.config.video_start_token_id
        ids += [*request.tokens[at : span.start], places.video if video else places.image]
        at = span.stop
        kind = "video_url" if video else "image_url"
        parts.append({"type": kind, "url": data_url(span.item, processor, video=video)})
    return {"token_ids": [*ids, *request.tokens[at:]], "content_parts": parts}


def data_url(item: MediaItem, processor: Processor, *, video: bool = False) -> str:
    """The picture, or the frames of a clip, that the patches were cut from.

    Raises:
        VLLMError: they are not those of a picture in this processor's sizes.
    """
    settings = processor.video if video else processor.image
    frames = pictures(item.patch_PX.numpy(), item.grid, settings)
    _check_same(item, frames, settings)
    encoded = [base64.b64encode(_png(frame)).decode() for frame in frames]
    # A clip as frames is "video/jpeg" to vLLM, which reads them by their content.
    return f"data:video/jpeg;base64,{','.join(encoded)}" if video else f"data:image/png;base64,{encoded[0]}"


def _check_same(item: MediaItem, frames: list[Image.Image], settings: PixelSettings) -> None:
    height, width = item.grid[1] * settings.patch_size, item.grid[2] * settings.patch_size
    resized = smart_resize(
        height, width, factor=settings.factor, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
    )
    if resized != (height, width):
        raise VLLMError(
            f"a picture of {width} x {height} pixels, resized already, would be resized again by vLLM, to "
            f"{resized[1]} x {resized[0]}: it lies outside of {settings.min_pixels} to {settings.max_pixels} pixels, "
            "the limits of the processor. Leave out pictures that are so long and thin, or raise max_pixels."
        )
    cut = np.concatenate([picture_patches(frame, height, width, settings) for frame in frames])
    if not np.array_equal(cut, item.patch_PX.numpy()):
        raise VLLMError(
            f"patches of a picture of {width} x {height} pixels are not those that this processor cuts: they were "
            "normalised otherwise, or changed. vLLM would see another picture than the trainer."
        )


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------- back


def to_completion(
    answer: Mapping[str, Any],
    request: Request,
    params: SamplingParams,
    processor: Processor,
    versions: Mapping[str, int],
) -> Completion:
    """
    Args:
        answer: JSON of the server.
        versions: label of the weights -> version, of all that this run has pushed.

    Raises:
        VLLMError: other ids than those that were sent, a token without its log-probability or one that is banned, an
            end that nothing asked for.
        StaleWeights: it must be asked again.
    """
    check_prompt(answer.get("prompt_token_ids"), request.tokens, processor)
    choice: Mapping[str, Any] = answer["choices"][0]
    ids: tuple[int, ...] = tuple(map(int, choice["token_ids"] or ()))
    reason = choice["finish_reason"]
    if reason not in ("stop", "length") or not ids:
        raise StaleWeights(f"it ended by {reason!r} after {len(ids)} tokens")
    of_token = _versions(choice.get("weight_versions"), len(ids), versions)
    logprobs = _logprobs(choice.get("logprobs"), ids)
    if banned := {*request.sampler.vocabulary.banned_ids, *params.banned_ids}.intersection(ids):
        raise VLLMError(
            f"vLLM has sampled token {min(banned)} ({processor.tokenizer.token(min(banned))!r}), which is banned."
        )
    detokenizer = request.detokenizer
    for token in ids:
        if detokenizer.stopped is not None:
            raise VLLMError(f"vLLM went on after {detokenizer.stopped!r}, which ends an answer.")
        detokenizer.push(token)
    detokenizer.finish()
    if detokenizer.stopped is None and (reason == "stop" or len(ids) != params.max_new_tokens):
        raise VLLMError(
            f"vLLM ended an answer after {len(ids)} of {params.max_new_tokens} tokens ({reason}, "
            f"{choice.get('stop_reason')!r}), and nothing that was asked for ends it there."
        )
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return Completion(
        token_ids=ids,
        text=detokenizer.text,
        finish=Finish.LENGTH if detokenizer.stopped is None else Finish.STOP,
        logprobs=logprobs,
        versions=of_token,
        stop=detokenizer.stopped,
        num_prompt_tokens=len(request.tokens),
        num_cached_tokens=details.get("cached_tokens") or 0,
    )


def check_prompt(theirs: list[int] | None, ours: list[int], processor: Processor) -> None:
    """Raises VLLMError: the server has made other ids of the prompt."""
    if theirs is None:
        raise VLLMError("vLLM does not say which ids it made of a prompt (return_token_ids). Use vLLM 0.32 or later.")
    image, video = processor.config.image_token_id, processor.config.video_token_id
    if image is not None:  # vLLM, as Baidu's own files, has one placeholder for images and videos
        ours = [image if token == video else token for token in ours]
    if theirs == ours:
        return
    at = next((n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    raise VLLMError(
        f"vLLM has made another prompt of the one it was sent: {len(theirs)} tokens for {len(ours)}, the first other "
        f"one at place {at}. Its processor cuts pictures otherwise: serve a folder that `ernie export layout=vllm` has "
        "written of this model, and give vLLM no --mm-processor-kwargs."
    )


def _versions(spans: Sequence[Mapping[str, Any]] | None, count: int, known: Mapping[str, int]) -> tuple[int, ...]:
    out: list[int] = []
    for span in spans or ():
        if span["version"] not in known:
            raise StaleWeights(f"its weights are labelled {span['version']!r}")
        if span["start"] != len(out):
            raise VLLMError(f"vLLM tells versions of its weights that do not follow each other: {spans}.")
        out += [known[span["version"]]] * (span["end"] - span["start"])
    if len(out) != count:
        raise VLLMError(f"vLLM tells the version of its weights for {len(out)} of {count} tokens.")
    return tuple(out)


def _logprobs(said: Mapping[str, Any] | None, ids: tuple[int, ...]) -> tuple[float, ...]:
    content = (said or {}).get("content") or []
    if [one["token_id"] for one in content] != list(ids):
        raise VLLMError("vLLM's log-probabilities are not those of the tokens that it has sampled.")
    logprobs = tuple(float(one["logprob"]) for one in content)
    for token, value in zip(ids, logprobs, strict=True):
        if not math.isfinite(value) or value <= NOTHING:
            raise VLLMError(f"vLLM has sampled token {token} and says that its probability is 0 ({value}).")
    return logprobs
