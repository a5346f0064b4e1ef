"""A group of attempts to examples: the prompt once, and every attempt as a branch of it (data/batch.py has the row).

    episode    <s> Which digit ? Assistant : | {zoom call} </s> | Tool: [picture] Assistant : | 7 </s>
    sampled     0   0   0  0      0         0    1 1  1     1      0  0  0  0      0         0   1  1
    prompt     <s> Which digit ? Assistant                                     the stem, without its last token
    attempt                                :  {zoom call} </s> Tool: [picture] Assistant : 7 </s>
    weight_T                                1  1   1      0    0     0         0         1 1  0         of the target

Tokens are those that were sampled and those that the engine was given: nothing is decoded and tokenised again. A token
that was sampled is learned; whatever tools answered is context. The engine's own log-probability of every sampled token
goes with it.

Shape letters:  T tokens   P patches   X numbers in a patch   L sparse layers   K experts per token
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.batch import Role
from data.encode import Example, shift
from ernie_model.config import ErnieConfig
from ernie_model.inference.agent import Episode
from ernie_model.inference.request import MediaItem
from ernie_model.rope import position_ids


class StreamError(RuntimeError):
    """What the engine reports of an attempt does not fit its tokens: nothing may be learned from it."""


def check_episode(episode: Episode, prompt_ids: Sequence[int]) -> None:
    """Raises StreamError: streams of different lengths, another prompt, a sampled token without a log-probability."""
    tokens = len(episode.token_ids)
    streams = {"sampled": episode.sampled, "logprobs": episode.logprobs, "versions": episode.versions}
    for name, stream in streams.items():
        if len(stream) != tokens:
            raise StreamError(f"an attempt has {tokens} tokens and {len(stream)} {name}.")
    if list(prompt_ids) != episode.token_ids[: len(prompt_ids)] or any(episode.sampled[: len(prompt_ids)]):
        raise StreamError("an attempt does not begin with its group's prompt, token by token.")
    if any(sampled != (version >= 0) for sampled, version in zip(episode.sampled, episode.versions, strict=True)):
        raise StreamError("the tokens that carry a version of the weights are not those that were sampled.")


def encode_group(
    episodes: Sequence[Episode],
    learned: Sequence[bool],
    config: ErnieConfig,
    *,
    id: str,
    dataset: str,
    max_tokens: int,
    max_patches: int | None,
) -> list[tuple[Example, list[int]]]:
    """Examples of a group's attempts, as few as rows of this size allow, and which attempts each holds.

    Args:
        episodes: that have sampled something, all after the same prompt.
        learned: False leaves an attempt in the row with nothing of it to learn; it counts all the same.
        max_tokens, max_patches: of a row. An attempt that fits in none is left out.

    Raises:
        StreamError: see `check_episode`.
    """
    prompt = episodes[0].num_prompt_tokens
    prompt_ids = episodes[0].token_ids[:prompt]
    shared = _media_before(episodes[0], prompt, config)
    bins: list[list[int]] = []
    sizes: list[tuple[int, int]] = []
    stem_tokens, stem_patches = prompt - 1, sum(map(_patches, shared))
    for index, episode in enumerate(episodes):
        check_episode(episode, prompt_ids)
        tokens = len(episode.token_ids) - prompt + 1
        patches = sum(map(_patches, episode.media[len(shared) :]))
        if stem_tokens + tokens > max_tokens or (max_patches is not None and stem_patches + patches > max_patches):
            continue
        for place, (held_tokens, held_patches) in enumerate(sizes):
            fits = held_tokens + tokens <= max_tokens
            if fits and (max_patches is None or held_patches + patches <= max_patches):
                bins[place].append(index)
                sizes[place] = held_tokens + tokens, held_patches + patches
                break
        else:
            bins.append([index])
            sizes.append((stem_tokens + tokens, stem_patches + patches))
    return [
        (
            _encode([episodes[i] for i in held], [learned[i] for i in held], shared, config, id=id, dataset=dataset),
            held,
        )
        for held in bins
    ]


def _patches(item: MediaItem) -> int:
    frames, rows, columns = item.grid
    return frames * rows * columns


def _media_before(episode: Episode, stop: int, config: ErnieConfig) -> list[MediaItem]:
    """The images and videos whose placeholders stand before token `stop`."""
    from ernie_model.rope import num_media_tokens

    ids = set(config.placeholder_token_ids)
    room = sum(token in ids for token in episode.token_ids[:stop])
    found = []
    for item in episode.media:
        room -= num_media_tokens(item.grid)
        if room < 0:
            break
        found.append(item)
    return found


def _encode(
    episodes: Sequence[Episode],
    learned: Sequence[bool],
    shared: Sequence[MediaItem],
    config: ErnieConfig,
    *,
    id: str,
    dataset: str,
) -> Example:
    prompt = episodes[0].num_prompt_tokens
    stem = slice(0, prompt - 1)
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("token_T", "target_T", "weight_T", "position_3T", "engine_logprob_T", "expert_TLK")
    }
    media = list(shared)
    told = next((one.expert_TLK for one in episodes if one.experts), None)
    for episode, learns in zip(episodes, learned, strict=True):
        token_T = torch.tensor(episode.token_ids)
        grids = [item.grid for item in episode.media]
        streams = {
            "token_T": token_T,
            "target_T": shift(token_T),
            "weight_T": shift(episode.action_T.float()) * learns,
            "position_3T": position_ids(token_T, grids, config),
            "engine_logprob_T": shift(torch.tensor(episode.logprobs, dtype=torch.float32)) * learns,
        }
        if told is not None:
            experts = episode.expert_TLK
            unknown = (len(episode.token_ids), *told.shape[1:])
            streams["expert_TLK"] = told.new_full(unknown, -1) if experts is None else experts
        first = not parts["token_T"]
        for name, stream in streams.items():
            if first:
                parts[name].append(stream[..., stem] if name == "position_3T" else stream[stem])
            parts[name].append(stream[..., prompt - 1 :] if name == "position_3T" else stream[prompt - 1 :])
        media += episode.media[len(shared) :]
    example = Example(
        id=id,
        token_T=torch.cat(parts["token_T"]),
        target_T=torch.cat(parts["target_T"]),
        weight_T=torch.cat(parts["weight_T"]),
        position_3T=torch.cat(parts["position_3T"], dim=1),
        grids=tuple(item.grid for item in media),
        patch_PX=torch.cat([item.patch_PX for item in media]) if media else None,
        dataset=dataset,
        lengths=tuple(map(len, parts["token_T"])),
        stems=(-1, *(0 for _ in episodes)),
        roles=(Role.PROMPT, *(Role.ATTEMPT for _ in episodes)),
        engine_logprob_T=torch.cat(parts["engine_logprob_T"]),
        expert_TLK=torch.cat(parts["expert_TLK"]) if parts["expert_TLK"] else None,
    )
    return example


def with_advantages(example: Example, advantages: Sequence[float], *, waited: int = 0) -> Example:
    """
    Args:
        advantages: of the example's attempts, in order.
        waited: rollouts that their group was in the queue for.
    """
    per_segment = torch.tensor([0.0, *advantages], dtype=torch.float32)
    spread_T = torch.repeat_interleave(per_segment, torch.tensor(example.lengths))
    waiting = (waited,) * len(example.lengths) if waited else ()
    return replace(example, advantage_T=spread_T * (example.weight_T != 0), waited=waiting)
