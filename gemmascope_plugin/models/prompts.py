"""The gate for prompts: everything that people hand over as one, as token ids with a mask.

==================================== =================================================================
one text                             BOS in front exactly once
several texts                        the same each; shorter ones padded behind their end
chat messages, or several such lists rendered by the tokenizer's template, Gemma's own where it has none
ids: list, array, tensor             taken as they are; lists may differ in length
a tokenizer's output, a mapping      its ``input_ids``, with ``attention_mask`` where it has one
==================================== =================================================================

1. Ids outside the vocabulary, empty prompts and prompts longer than the model's context are refused, and
   so are bytes, which look like ids, sets, which have no order, and words that a tokenizer without bytes
   (the bundled model's) does not know.
2. PAD at the ends of ids is padding whether or not a mask says so: attended to, it would change every
   number after it without a word.
3. ``Prompts.packed`` moves padding behind the end, where a causal model does not look: no attention mask,
   the same positions, the same numbers as one by one, on both model classes.

Cost: the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.arguments import BYTES, as_indices
from gemmascope_plugin.errors import (
    EmptySelectionError,
    InputError,
    ModelError,
    TaskError,
)
from gemmascope_plugin.models.chat import conversation_text, is_chat
from gemmascope_plugin.models.protocol import HookedModel, check_model, describe, device_of
from gemmascope_plugin.models.tokens import check_ids, refuse_unknown_words, text_ids

PromptLike = Any
"""One prompt or several, in any of the forms above."""

Batch = tuple[Int[torch.Tensor, "prompt length"], Int[torch.Tensor, " prompt"]]
"""Token ids, padded behind the end, and the length of each prompt."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of a model as ids, where they were given."""

    tokens: Int[torch.Tensor, "prompt pos"]
    mask: Bool[torch.Tensor, "prompt pos"]
    """False at padding."""
    pad: int
    """What stands at padding after :meth:`packed`."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[torch.Tensor, " prompt"]:
        """Tokens of each prompt."""
        return self.mask.sum(1)

    @property
    def is_padded(self) -> bool:
        """Whether any prompt is shorter than the row that holds it."""
        return not bool(self.mask.all())

    def packed(self) -> Batch:
        """The same with padding behind the end of every prompt, and their lengths."""
        if not self.is_padded:
            return self.tokens, self.lengths
        lengths = self.lengths
        at = torch.arange(int(lengths.max()), device=self.tokens.device)
        places = (self.mask.int().argmax(1)[:, None] + at).clamp(max=self.mask.shape[1] - 1)
        inside = at < lengths[:, None]
        return self.tokens.gather(1, places).masked_fill(~inside, self.pad), lengths

    def rows(self) -> list[Int[torch.Tensor, " pos"]]:
        """The prompts one by one, without padding."""
        return [ids[mask] for ids, mask in zip(self.tokens, self.mask, strict=True)]


def read_prompts(model: HookedModel, prompts: PromptLike, mask: Any = None) -> Prompts:
    """One prompt or several as token ids on the model's device; texts need a tokenizer.

    ``mask`` is False (or 0) where ids are padding, ``[prompt, pos]``; None to go by PAD, True for a
    pass that continues others, where every id counts.
    """
    check_model(model)
    if isinstance(prompts, Prompts):
        return prompts
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        mask = prompts.get("attention_mask") if mask is None else mask
        prompts = prompts["input_ids"]
    pad = pad_id(model)
    rows = _rows(model, prompts)
    _check_rows(model, rows)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    if mask is True:
        pass
    elif mask is None:
        inside &= ~_outer(tokens, _padding(model))
    else:
        inside &= _given_mask(mask, tuple(tokens.shape))
    if not bool(inside.any(1).all()):
        row = int((~inside.any(1)).nonzero()[0])
        raise EmptySelectionError(f"Prompt {row} has no tokens but padding")
    longest = int(inside.sum(1).argmax())
    check_context(model, int(inside[longest].sum()), longest)
    device = device_of(model)
    return Prompts(tokens.to(device), inside.to(device), pad)


def to_tokens(model: HookedModel, text: PromptLike) -> Int[torch.Tensor, "batch pos"]:
    """Token ids of prompts of one length, BOS in front of texts exactly once.

    Args:
        model: The model; without a tokenizer only token ids are accepted.
        text: One prompt, or several of equal length in tokens; padding behind ids stays, as in a corpus.

    Raises:
        EmptySelectionError: No prompt, or a prompt without any text.
        InputError: Something that is not a prompt.
        ModelError: Text was given and the model has no tokenizer, or lengths differ.
    """
    prompts = read_prompts(model, text)
    tokens, lengths = prompts.packed()
    whole = bool((lengths == lengths[0]).all())
    is_matrix = getattr(text, "ndim", 0) == 2
    if is_matrix and bool(prompts.mask[:, 0].all()):
        return prompts.tokens  # ids with padding behind them keep their places
    if not whole and not is_matrix:
        raise ModelError(
            f"The prompts have different lengths: {sorted(set(lengths.tolist()))} tokens",
            fix="give prompts of one length, or call once per prompt",
        )
    return tokens


def one_prompt(model: HookedModel, prompt: PromptLike, fix: str) -> Int[torch.Tensor, "1 pos"]:
    """Token ids of exactly one prompt, without padding; ``fix`` says what to do with several."""
    prompts = read_prompts(model, prompt)
    if len(prompts) > 1:
        raise TaskError(f"{len(prompts)} prompts were given, this is of one", fix=fix)
    return prompts.rows()[0][None]


def documents(model: HookedModel, tokens: PromptLike) -> list[Int[torch.Tensor, "document pos"]]:
    """Documents as tensors of ids, neighbours of one length together.

    They come as token ids ``[document, pos]``, several such tensors, or what is a prompt elsewhere.
    """
    if isinstance(tokens, torch.Tensor):
        return [to_tokens(model, tokens)]
    is_listed = isinstance(tokens, (list, tuple))
    if is_listed and all(isinstance(part, torch.Tensor) and part.ndim == 2 for part in tokens):
        return [to_tokens(model, part) for part in tokens]
    groups: list[list[torch.Tensor]] = []
    for row in read_prompts(model, tokens).rows():
        if groups and len(groups[-1][0]) == len(row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.stack(rows) for rows in groups]


def check_room(model: HookedModel, length: int, new: int) -> None:
    """Refuses ``new`` tokens behind a prompt that would leave the model's context."""
    limit = getattr(model.cfg, "n_ctx", None)
    if limit is not None and length + new > limit:
        raise ModelError(
            f"A prompt of {length} tokens and {new} new ones are longer than the model's context of "
            f"{limit}",
            fix=f"max_new_tokens={max(limit - length, 1)}, or a shorter prompt",
        )


def check_context(model: HookedModel, length: int, row: int = 0) -> None:
    """Refuses prompt number ``row`` of so many tokens if the model's context has no room for it."""
    limit = getattr(model.cfg, "n_ctx", None)
    if limit is not None and length > limit:
        raise ModelError(
            f"Prompt {row} has {length} tokens, the model's context has {limit}",
            fix="a shorter prompt, or several",
        )


def pad_id(model: HookedModel) -> int:
    """What fills rows behind the end of their prompts."""
    number = getattr(model.tokenizer, "pad_token_id", None)
    return 0 if number is None else int(number)


def _padding(model: HookedModel) -> int | None:
    """The id that is nothing but padding; None where there is none, or where it has another meaning."""
    number = getattr(model.tokenizer, "pad_token_id", None)
    others = [getattr(model.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")]
    return None if number is None or number in others else int(number)


def refuse_bytes_and_sets(prompts: PromptLike) -> None:
    """Refuses what gives numbers or texts one by one that are not ids, or in no order."""
    if isinstance(prompts, BYTES):
        raise InputError(
            f"{describe(prompts)} is not a prompt: bytes are neither text nor token ids",
            fix="data.decode() for the text, list(data) where they are token ids",
        )
    if isinstance(prompts, Set):
        raise InputError(
            f"{describe(prompts)} is not a prompt: it has no order", fix="a list of the same"
        )


def _rows(model: HookedModel, prompts: PromptLike) -> list[Int[torch.Tensor, " _"]]:
    """The ids of every prompt, on the CPU."""
    refuse_bytes_and_sets(prompts)  # first, as a memoryview has axes
    if getattr(prompts, "ndim", 0) or hasattr(prompts, "__array__"):
        matrix = _integers(prompts)
        return list(matrix if matrix.ndim == 2 else matrix[None])
    if isinstance(prompts, str) or is_chat(prompts):
        text = prompts if isinstance(prompts, str) else conversation_text(model, prompts)
        ids = text_ids(model, text)
        refuse_unknown_words(model, text, ids)
        return [ids]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable) or prompts is model:
        raise _not_a_prompt(prompts)
    listed = list(prompts)
    if not listed:
        raise EmptySelectionError("There is no prompt: the prompt is empty", fix="'a text'")
    if not isinstance(listed[0], str) and (ids := as_indices(listed)) is not None:
        return [torch.tensor(ids)]
    return [_row(model, prompt) for prompt in listed]


def _row(model: HookedModel, prompt: PromptLike) -> Int[torch.Tensor, " _"]:
    """One of several prompts."""
    if isinstance(prompt, list | tuple) and not len(prompt):
        raise EmptySelectionError("The prompt is empty", fix="at least one token")
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        rows = [row.cpu() for row in read_prompts(model, prompt).rows()]
    else:
        rows = _rows(model, prompt)
    if len(rows) != 1:
        raise InputError(
            f"A prompt of the list holds {len(rows)} prompts",
            fix="a flat list, or ids [prompt, pos]",
        )
    return rows[0]


def _integers(prompts: PromptLike) -> Int[torch.Tensor, ...]:
    """An array or tensor of ids, ``[pos]`` or ``[prompt, pos]``."""
    ids = prompts.detach().cpu() if isinstance(prompts, torch.Tensor) else None
    if ids is None:
        import numpy as np

        array = np.asarray(prompts)
        ids = torch.from_numpy(array.copy()) if array.dtype.kind in "iu" else torch.zeros(())
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise _not_a_prompt(prompts)
    if not ids.numel():
        raise EmptySelectionError("The prompt has no tokens")
    return ids.long()


def _check_rows(model: HookedModel, rows: list[torch.Tensor]) -> None:
    for row in rows:
        if not len(row):
            raise EmptySelectionError("The prompt has no tokens")
        check_ids(model, (int(row.min()), int(row.max())))


def _outer(tokens: torch.Tensor, pad: int | None) -> Bool[torch.Tensor, "prompt pos"]:
    """True at PAD before the first and behind the last other token of a row."""
    if pad is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    other = tokens != pad
    return (other.cumsum(1) == 0) | (other.flip(1).cumsum(1).flip(1) == 0)


def _given_mask(mask: Any, shape: tuple[int, ...]) -> Bool[torch.Tensor, "prompt pos"]:
    """A mask by token, checked."""
    mask = torch.as_tensor(mask).detach().cpu().bool()
    mask = mask[None] if mask.ndim == 1 else mask
    if tuple(mask.shape) != shape:
        raise TaskError(
            f"mask has shape {tuple(mask.shape)}, the prompts are {shape}",
            fix="token ids [prompt, pos] and a mask of the same shape",
        )
    starts = mask.int().diff(dim=1, prepend=torch.zeros(len(mask), 1, dtype=torch.int)) == 1
    if bool((starts.sum(1) > 1).any()):
        row = int((starts.sum(1) > 1).nonzero()[0])
        raise TaskError(f"The mask of prompt {row} has a hole", fix="True at one run of tokens")
    return mask


def _not_a_prompt(prompts: object) -> InputError:
    return InputError(
        f"{describe(prompts)} is not a prompt",
        exists="a text, several texts, token ids as list, array or tensor, a tokenizer's output, "
        'messages [{"role": "user", "content": "..."}]',
    )


def padded(model: HookedModel, prompts: PromptLike) -> Batch:
    """One prompt or several as one batch."""
    return read_prompts(model, prompts).packed()


def right_padded(
    model: HookedModel,
    tokens: Int[torch.Tensor, "prompt pos"],
    mask: Bool[torch.Tensor, "prompt pos"],
) -> Batch:
    """Token ids with padding anywhere outside the prompts, moved behind their ends."""
    return read_prompts(model, tokens, mask).packed()
