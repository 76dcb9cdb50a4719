"""The frozen context: the model's state after the context, made once, read by any continuations (trainer).

The context is run without gradients and its state kept: attention keys and values, convolution and recurrent
states (`model/states.py`). A continuation then runs with gradients on top of it. transformers' own cache cannot do
this: it is written in place, which destroys what backward needs and what the next continuation reads. So the state
is held in layers that answer `update_*` with the concatenation, or with the new state, and store nothing;
transformers is not patched.

What is frozen is all of the context but its last token: that one is read again, with gradients, because its
output predicts the first token of the continuation. The gradient is that of a model whose prefix is a constant:
exact for that (law 3), and a truncation of full training, in which context positions would get gradients too.

A longer context starts from the prefix of a shorter one (`extend`): what both share is computed once.

Continuations of different contexts share a forward where every layer is attention: their prefixes are padded at the
left and the padding is masked. A recurrence would have to run over it, so there it is one context at a time.

A recurrence that reads one token alone takes the path of decoding, which writes its state in place; so it is never
given one token alone (`_outputs` pads).

Shapes: K continuations of one context, C context tokens, T continuation tokens; keys and values (1, heads, C-1,
head), convolution states (1, channels, kernel), recurrent states (1, heads, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from secondnature.errors import BadExample, StalePrefix, UnsupportedModel
from secondnature.model.head import (
    find_head,
    likeliest,
    picked_logps,
    target_logps,
    token_logps,
    token_ranks,
    whole_logits,
)
from secondnature.model.limits import context_limit
from secondnature.model.states import BothLayer, EmptyLayer, Keeps, kept, reading

__all__ = [
    "LayerState",
    "Prefix",
    "continuation_likeliest",
    "continuation_logits",
    "continuation_logps",
    "continuation_picked",
    "continuation_ranks",
    "extend",
    "extend_all",
    "freeze",
    "self_test",
    "side_by_side",
]

PAD_ID = 0
"""Fills the right end of shorter continuations; causality keeps it out of every real position."""


TOLERANCE, TOLERANCE_NARROW = 1e-3, 0.1
"""Between two ways of reading the same text, of the logits' scale: in fp32, in bf16 and fp16."""


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps of a context."""

    attention: tuple[Tensor, Tensor] | None = None
    """Keys and values."""
    recurrences: tuple[tuple[Tensor | None, Tensor | None], ...] = ()
    """Pairs of a convolution and a recurrent state; a layer may have only one of the two."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*(self.attention or ()), *(t for pair in self.recurrences for t in pair if t is not None)]


class _FrozenAttention(DynamicLayer):
    """Keys and values of the context; new ones are appended to a copy."""

    def __init__(self, state: LayerState, batch: int) -> None:
        DynamicLayer.__init__(self)
        assert state.attention is not None
        self.keys, self.values = state.attention
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        batch = key_states.shape[0]
        keys, values = self.keys.expand(batch, -1, -1, -1), self.values.expand(batch, -1, -1, -1)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class _FrozenRecurrence(LinearAttentionLayer):
    """Convolution and recurrent states after the context; new states are returned, never stored."""

    def __init__(self, state: LayerState, batch: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=len(state.recurrences))
        for index, (conv, recurrent) in enumerate(state.recurrences):
            self.conv_states[index] = _rows(conv, batch)
            self.recurrent_states[index] = _rows(recurrent, batch)
            self.is_conv_states_initialized[index] = conv is not None
            self.is_recurrent_states_initialized[index] = recurrent is not None
            self.has_previous_state[index] = True

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        before = self.conv_states[state_idx]
        assert before is not None
        return torch.cat([before, conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return recurrent_states


class _FrozenBoth(_FrozenRecurrence, _FrozenAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Attention and recurrences side by side."""

    def __init__(self, state: LayerState, batch: int) -> None:
        _FrozenAttention.__init__(self, state, batch)
        _FrozenRecurrence.__init__(self, state, batch)


def _rows(state: Tensor | None, batch: int) -> Tensor | None:
    """One state for each of so many continuations; costs no memory."""
    return None if state is None else state.expand(batch, *[-1] * (state.ndim - 1))


def _frozen(state: LayerState, batch: int) -> Any:
    if not state.tensors:
        return EmptyLayer()
    if state.attention is None:
        return _FrozenRecurrence(state, batch)
    return _FrozenBoth(state, batch) if state.recurrences else _FrozenAttention(state, batch)


@dataclass(frozen=True)
class Prefix:
    """The state after all context tokens but the last; immutable, so it can be read any number of times."""

    states: tuple[LayerState, ...]
    """Per layer; none where the context has one token."""
    num_tokens: int
    """C - 1."""
    last_id: int
    """The context's last token: the first input of every continuation."""
    version: str | None = None
    """The weights it was computed with, in the words of whoever made it."""

    @property
    def num_bytes(self) -> int:
        """What its states take."""
        return sum(t.numel() * t.element_size() for state in self.states for t in state.tensors)

    @property
    def recurs(self) -> bool:
        """Whether a layer carries a state from token to token."""
        return any(state.recurrences for state in self.states)

    def check(self, version: str | None) -> None:
        """Raises StalePrefix if it was computed with other weights than `version`."""
        if self.version != version:
            raise StalePrefix(
                f"the prefix was computed with weights {self.version!r}; expected {version!r}",
                "freeze the context again: a prefix does not outlive a write",
            )

    def cache(self, batch: int) -> Cache | None:
        """The state as transformers wants it, for `batch` continuations; costs no memory until it is read."""
        if self.num_tokens == 0:
            return None
        return Cache(layers=[_frozen(state, batch) for state in self.states])


def freeze(model: nn.Module, context_ids: Sequence[int], *, version: str | None = None) -> Prefix:
    """Run the context and keep the model's state before its last token.

    Raises:
        BadExample: the context is empty.
        UnsupportedModel: the model keeps state of a kind that cannot be frozen.
    """
    if not context_ids:
        raise BadExample(
            "the context is empty", "give at least one context token (the beginning-of-text token)"
        )
    return _read(model, Prefix((), 0, context_ids[0], version), context_ids[1:])


def extend(model: nn.Module, base: Prefix, more_ids: Sequence[int], *, version: str | None = None) -> Prefix:
    """The prefix of the base's context and `more_ids` after it; only the new tokens are computed.

    Equal to freezing the whole context, but for the rounding of another split into chunks. The base stays as it
    is; keys and values are copied from it.

    Raises:
        StalePrefix: the base was computed with other weights than `version`.
        UnsupportedModel: the model keeps state of a kind that cannot be frozen.
    """
    base.check(version)
    return _read(model, base, more_ids)


def _read(model: nn.Module, base: Prefix, more_ids: Sequence[int]) -> Prefix:
    """The base after more tokens: its last token is run, and all of the new ones but the last."""
    return _read_all(model, base, [more_ids])[0] if more_ids else base


@torch.no_grad()
def _read_all(model: nn.Module, base: Prefix, mores: Sequence[Sequence[int]]) -> list[Prefix]:
    """`_read` of several (none empty) in one forward, padded at the right; of one only where a layer recurs."""
    counts = [len(more) for more in mores]  # of tokens that are run: the base's last is, their own is not
    inputs = [[base.last_id, *more[:-1], *[PAD_ID] * (max(counts) - len(more))] for more in mores]
    wanted = kept(model.config)
    cache = _writable(wanted, base, len(mores))
    ids = torch.tensor(inputs, device=next(model.parameters()).device)
    body = getattr(model, "base_model", model)  # nobody asks for logits
    body(input_ids=ids, **reading(body, cache, _places(base, ids)))
    states: list[LayerState] = []
    for index, (layer, keeps) in enumerate(zip(cache.layers, wanted, strict=True)):
        state = _kept_by(layer, keeps)
        if state is None:
            raise UnsupportedModel(
                f"layer {index} of {type(model).__name__} has not kept the frozen context it read",
                "this architecture or transformers version cannot be trained with a frozen context",
            )
        states.append(state)
    ends = [base.num_tokens + count for count in counts]
    return [
        Prefix(
            tuple(states) if len(mores) == 1 else tuple(_row(state, row, end) for state in states),
            end,
            more[-1],
            base.version,
        )
        for row, (more, end) in enumerate(zip(mores, ends, strict=True))
    ]


def _row(state: LayerState, row: int, end: int) -> LayerState:
    """One text's keys and values, up to `end`, of several that were read together."""
    assert not state.recurrences, "their padding would be in the state"
    if state.attention is None:
        return LayerState()
    keys, values = (t[row : row + 1, :, :end].clone() for t in state.attention)
    return LayerState((keys, values))


def extend_all(
    model: nn.Module, base: Prefix, mores: Sequence[Sequence[int]], *, version: str | None = None
) -> list[Prefix]:
    """`extend` by each of `mores` (none empty), in one forward; for models whose layers are all attention.

    Equal to extending by one after the other, but for rounding. Raises as `extend` does.
    """
    base.check(version)
    return _read_all(model, base, mores)


def _places(prefix: Prefix, ids: Tensor) -> Tensor:
    """The positions (1, T) of tokens that are read after a prefix."""
    return torch.arange(ids.shape[1], device=ids.device)[None] + prefix.num_tokens


def _kept_by(layer: Any, keeps: Keeps) -> LayerState | None:
    """What a layer of transformers' cache holds; None: not what it should."""
    attention: tuple[Tensor, Tensor] | None = None
    if keeps.attention:
        if layer.keys is None or layer.values is None:
            return None
        attention = (layer.keys, layer.values)
    pairs = tuple((layer.conv_states[i], layer.recurrent_states[i]) for i in range(keeps.recurrences))
    if any(conv is None and recurrent is None for conv, recurrent in pairs):
        return None
    return LayerState(attention, pairs)


def _writable(wanted: Sequence[Keeps], base: Prefix, batch: int) -> Cache:
    """transformers' own layers, filled with the base's states; what they write in place is a copy."""
    layers: list[Any] = [_empty(keeps) for keeps in wanted]
    for layer, state in zip(layers, base.states, strict=bool(base.states)):
        if state.attention is not None:
            layer.lazy_initialization(*state.attention)
            # never written: new keys are concatenated
            layer.keys, layer.values = (t.expand(batch, -1, -1, -1) for t in state.attention)
        for index, (conv, recurrent) in enumerate(state.recurrences):
            layer.lazy_initialization(conv_states=conv, recurrent_states=recurrent, state_idx=index)
            for mine, theirs in (
                (layer.conv_states[index], conv),
                (layer.recurrent_states[index], recurrent),
            ):
                if theirs is not None:
                    mine.copy_(theirs)
            layer.has_previous_state[index] = True
    return Cache(layers=layers)


def _empty(keeps: Keeps) -> Any:
    if keeps.recurrences:
        kind = BothLayer if keeps.attention else LinearAttentionLayer
        return kind(number_of_states=keeps.recurrences)
    return DynamicLayer() if keeps.attention else EmptyLayer()


def continuation_logits(
    model: nn.Module,
    prefix: Prefix | Sequence[Prefix],
    continuations: Sequence[Sequence[int]],
    *,
    last: Sequence[int] | None = None,
    version: str | None = None,
) -> list[Tensor]:
    """Per continuation the logits (T, V) that predict each of its tokens, or its `last` ones.

    `prefix`: of all, or one for each; different ones for a model that reads them `side_by_side`.

    Raises:
        BadExample: a continuation is empty.
        StalePrefix: the prefix was computed with other weights than `version`.
    """
    counts = [len(c) for c in continuations] if last is None else list(last)
    head = find_head(model)
    rows = _outputs(model if head is None else head.body, prefix, continuations, counts, version)
    return list((rows if head is None else whole_logits(head, rows)).split(counts))


def continuation_logps(
    model: nn.Module,
    prefix: Prefix | Sequence[Prefix],
    continuations: Sequence[Sequence[int]],
    *,
    version: str | None = None,
) -> list[Tensor]:
    """Per continuation the log-probabilities (T) of its tokens, in nats; with gradients if they are enabled.

    Raises as `continuation_logits` does.
    """
    counts = [len(c) for c in continuations]
    head = find_head(model)
    rows = _outputs(model if head is None else head.body, prefix, continuations, counts, version)
    targets = torch.tensor([token for c in continuations for token in c], device=rows.device)
    logps = target_logps(rows, targets) if head is None else token_logps(head, rows, targets)
    return list(logps.split(counts))


def continuation_picked(
    model: nn.Module,
    prefix: Prefix | Sequence[Prefix],
    continuations: Sequence[Sequence[int]],
    tokens: Sequence[Tensor],
) -> list[Tensor]:
    """Per continuation the log-probabilities (T, K), in nats, of the `tokens` (T, K) at its last T positions.

    With gradients if they are enabled; raises as `continuation_logits` does.
    """
    counts = [len(t) for t in tokens]
    head = find_head(model)
    rows = _outputs(model if head is None else head.body, prefix, continuations, counts, None)
    tokens_NK = torch.cat([t.to(rows.device, torch.long) for t in tokens])
    if head is not None:
        return list(picked_logps(head, rows, tokens_NK).split(counts))
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return list(torch.log_softmax(wide, dim=-1).gather(1, tokens_NK).split(counts))


@torch.no_grad()
def continuation_likeliest(
    model: nn.Module, prefix: Prefix, continuation: Sequence[int], last: int, count: int
) -> Tensor:
    """The `count` likeliest tokens (last, count) at the last positions of a continuation, by ascending id.

    Raises as `continuation_logits` does.
    """
    head = find_head(model)
    rows = _outputs(model if head is None else head.body, prefix, [continuation], [last], None)
    if head is not None:
        return likeliest(head, rows, count)
    return rows.topk(min(count, rows.shape[1]), dim=1).indices.sort(dim=1).values


@torch.no_grad()
def continuation_ranks(
    model: nn.Module,
    prefix: Prefix | Sequence[Prefix],
    continuations: Sequence[Sequence[int]],
    *,
    version: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Per continuation (log-probabilities (T) of its tokens, whether each is the likeliest (T)); no gradients.

    Raises as `continuation_logits` does.
    """
    counts = [len(c) for c in continuations]
    head = find_head(model)
    rows = _outputs(model if head is None else head.body, prefix, continuations, counts, version)
    targets = torch.tensor([token for c in continuations for token in c], device=rows.device)
    if head is None:
        logps, likeliest = target_logps(rows, targets), rows.argmax(dim=1) == targets
    else:
        logps, likeliest = token_ranks(head, rows, targets)
    return list(zip(logps.split(counts), likeliest.split(counts), strict=True))


def _outputs(
    run: nn.Module,
    prefix: Prefix | Sequence[Prefix],
    continuations: Sequence[Sequence[int]],
    counts: Sequence[int],
    version: str | None,
) -> Tensor:
    """What the model, or its body, puts out at the last `counts` positions of each continuation, in one piece.

    One forward of all, padded at the right: (sum of counts, V), or D for a body.
    """
    rows = [prefix] * len(continuations) if isinstance(prefix, Prefix) else list(prefix)
    for one in rows:
        one.check(version)
    if not all(continuations):
        raise BadExample("a continuation is empty", "nothing to learn from, nothing to score")
    longest = max(*(len(c) for c in continuations), 2 if any(p.recurs for p in rows) else 1)
    inputs = [
        [p.last_id, *c[:-1], *[PAD_ID] * (longest - len(c))] for p, c in zip(rows, continuations, strict=True)
    ]
    ids = torch.tensor(inputs, device=next(run.parameters()).device)
    output = run(input_ids=ids, **_after(run, rows, ids))
    whole = output.logits if "logits" in output else output.last_hidden_state
    ends = zip(whole, continuations, counts, strict=True)
    return torch.cat([row[len(c) - count : len(c)] for row, c, count in ends])


def _after(run: nn.Module, rows: Sequence[Prefix], ids: Tensor) -> dict[str, Any]:
    """The arguments with which each row of ids (K, T) is read after its prefix."""
    first = rows[0]
    if all(p is first for p in rows):
        return reading(run, first.cache(len(rows)), _places(first, ids))
    counts = [p.num_tokens for p in rows]
    longest, lengths = max(counts), torch.tensor(counts, device=ids.device).unsqueeze(1)
    places = torch.arange(ids.shape[1], device=ids.device) + lengths
    if longest == 0:
        return reading(run, None, places)
    num_layers = max(len(p.states) for p in rows)
    cache = Cache(layers=[_frozen(_stacked(rows, i, longest), len(rows)) for i in range(num_layers)])
    found = reading(run, cache, places)
    if min(counts) < longest:
        every = torch.arange(longest + ids.shape[1], device=ids.device)
        found["attention_mask"] = (every >= longest - lengths).long()
    return found


def _stacked(rows: Sequence[Prefix], layer: int, longest: int) -> LayerState:
    """A layer's keys and values of all rows (K, heads, longest, head), zeros before those that are shorter."""
    pairs = [p.states[layer].attention if p.states else None for p in rows]
    model = next((pair for pair in pairs if pair is not None), None)
    if model is None:
        return LayerState()
    keys, values = (t.new_zeros(len(rows), t.shape[1], longest, t.shape[3]) for t in model)
    for row, pair in enumerate(pairs):
        for whole, part in zip((keys, values), pair or (), strict=False):
            whole[row, :, longest - part.shape[2] :] = part[0]
    return LayerState((keys, values))


_SIDE_BY_SIDE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def side_by_side(model: nn.Module) -> bool:
    """Whether continuations of different prefixes can be read in one forward.

    Every layer must be attention, and the model itself is asked, the first time: it has to tell padding apart and
    to take positions.
    """
    if model not in _SIDE_BY_SIDE:
        _SIDE_BY_SIDE[model] = _reads_side_by_side(model)
    return _SIDE_BY_SIDE[model]


@torch.no_grad()
def _reads_side_by_side(model: Any) -> bool:
    takes = inspect.signature(model.forward).parameters
    if not {"attention_mask", "position_ids"} <= takes.keys():
        return False
    if not all(k.attention and not k.recurrences for k in kept(model.config)):
        return False
    num_ids = int(model.config.get_text_config(decoder=True).vocab_size)
    if context_limit(model.config) < 10:
        return False
    one, two, three, answer = ([(i * i + k) % num_ids for i in range(6)] for k in range(4))
    prefixes = [freeze(model, one), freeze(model, two[:3]), freeze(model, three[:1])]
    answers = [answer[:2], answer[:4], answer[:3]]
    alone = [continuation_logits(model, p, [a])[0] for p, a in zip(prefixes, answers, strict=True)]
    together = continuation_logits(model, prefixes, answers)
    scale = max(1.0, *(float(x.abs().max()) for x in alone))
    close = TOLERANCE_NARROW if alone[0].dtype in (torch.bfloat16, torch.float16) else TOLERANCE
    return all(float((a - b).abs().max()) <= close * scale for a, b in zip(alone, together, strict=True))


@torch.no_grad()
def self_test(model: nn.Module, *, tolerance: float | None = None) -> float:
    """Compare continuations on a frozen prefix with plain runs of the whole text; returns the largest difference.

    Two continuations of different lengths, one of a single token, on a context of 70 tokens (over one chunk of the
    delta rule) where the model can read that many. Run it once per model before the first step.

    Raises:
        UnsupportedModel: the difference exceeds `tolerance` (None: 1e-3 of the logits' scale in fp32, 0.1 in bf16),
            or reading the prefix changed it.
    """
    config: Any = model.config
    limit = context_limit(config)
    num_context = min(70, limit - 8)
    if num_context < 2:
        raise UnsupportedModel(f"the model reads only {limit} tokens", "expected 10 or more")
    num_ids: int = config.get_text_config(decoder=True).vocab_size
    text = [(7 * i + i * i // 3) % num_ids for i in range(num_context + 5)]
    context, answer = text[:num_context], text[num_context:]
    prefix = freeze(model, context)
    first = continuation_logits(model, prefix, [answer, answer[:1]])
    again = continuation_logits(model, prefix, [answer, answer[:1]])
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        raise UnsupportedModel(
            "reading a frozen prefix changed it", "this transformers version is not supported"
        )
    ids = torch.tensor([text[:-1]], device=first[0].device)
    plain = model(input_ids=ids, use_cache=False).logits[0, num_context - 1 :]
    difference = max(float((first[0] - plain).abs().max()), float((first[1] - plain[:1]).abs().max()))
    scale = max(1.0, float(plain.abs().max()))
    if tolerance is None:
        narrow = plain.dtype in (torch.bfloat16, torch.float16)
        tolerance = (TOLERANCE_NARROW if narrow else TOLERANCE) * scale
    if not difference <= tolerance:
        raise UnsupportedModel(
            f"a frozen context changes the logits by {difference:.2g}; expected at most {tolerance:.2g}",
            "this architecture or transformers version cannot be trained with a frozen context",
        )
    return difference
