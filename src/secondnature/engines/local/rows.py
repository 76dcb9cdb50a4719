"""The state of the rows that are being generated: K/V, convolution and recurrent states (process A).

The rows of a batch lie right-aligned ("left-padded") in buffers that grow by doubling: every row's newest token is
in the same column, so one step writes one column and copies nothing. A row that joins is copied in once; a row that
leaves is overwritten by the last one. Recurrent states have no columns and are stacked by row.

Sliding and chunked layers keep all keys, as full ones do: which of them a token may look at is decided by
transformers' masks, and a row can join or leave without anybody counting windows.

The layers implement the cache interface of transformers 5.23 (`cache_utils`); transformers zeroes the padded
positions in front of a recurrence itself (`create_recurrent_attention_mask`), which the self-test checks.
Padding has to be *finite*, not only masked: 0 * NaN is NaN in attention, so columns that a row does not own are
zeroed when it joins.

Shapes: B rows, H heads, S columns, D head size, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from secondnature.model.states import EmptyLayer, Keeps, kept, reading

MIN_COLUMNS = 64


class Window:
    """Which columns are in use; shared by all attention layers of a batch."""

    def __init__(self) -> None:
        self.start = 0
        """First column that any row owns."""
        self.end = 0
        """One past the newest token of every row."""


class AttentionRows(CacheLayerMixin):
    """Keys and values of one attention layer: buffers [capacity, H, S, D], rows 0..B-1 in use."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        CacheLayerMixin.__init__(self)
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for the rows of the first forward."""
        b, h, t, _ = key_states.shape
        columns = max(self.window.end + t, MIN_COLUMNS)
        self.keys = key_states.new_zeros(b, h, columns, key_states.shape[-1])
        self.values = value_states.new_zeros(b, h, columns, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns and return all that the rows may look at: [B, H, end - start + T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        b, t = key_states.shape[0], key_states.shape[2]
        start, end = self.window.start, self.window.end
        if end + t > self.keys.shape[2]:
            self.resize(self.keys.shape[0], max(2 * self.keys.shape[2], end + t))
        self.keys[:b, :, end : end + t] = key_states
        self.values[:b, :, end : end + t] = value_states
        return self.keys[:b, :, start : end + t], self.values[:b, :, start : end + t]

    def resize(self, rows: int, columns: int, shift: int = 0) -> None:
        """Bigger buffers, zero where nothing was; the content moves right by `shift` columns."""
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            end = min(self.window.end, old.shape[2])
            new[: old.shape[0], :, shift : end + shift] = old[:, :, :end]
            setattr(self, name, new)

    def move_left(self, rows: int, start: int, end: int) -> None:
        """Columns start..end of the first rows move to 0..end-start, which lies before start."""
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[:rows, :, : end - start] = buffer[:rows, :, start:end]

    def put(self, row: int, other: AttentionRows, other_row: int, length: int) -> None:
        """Copy a row of another batch in, right-aligned; zero the rest of the row."""
        end, other_end = self.window.end, other.window.end
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            assert mine is not None
            assert theirs is not None
            mine[row, :, : end - length] = 0
            mine[row, :, end - length : end] = theirs[other_row, :, other_end - length : other_end]

    def begin_with(self, other: AttentionRows, lengths: Sequence[int], columns: int) -> None:
        """Fresh buffers of rows that begin as the only row of `other` does, each with so many of its columns."""
        end = self.window.end
        for name in ("keys", "values"):
            theirs: Tensor = getattr(other, name)
            new = theirs.new_zeros(len(lengths), theirs.shape[1], max(columns, MIN_COLUMNS), theirs.shape[3])
            for row, length in enumerate(lengths):
                new[row, :, end - length : end] = theirs[0, :, :length]
            setattr(self, name, new)
        self.is_initialized = True

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite one row by another."""
        end = self.window.end
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[target, :, :end] = buffer[source, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of columns that a forward of `query_length` tokens looks at, offset)."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.window.end - self.window.start

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class LinearRows(LinearAttentionLayer):
    """Convolution [B, channels, kernel] and recurrent [B, ...] states of one layer."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Keep the last `conv_kernel_size` columns, return what the convolution has to see."""
        kernel = conv_kernel_size or conv_states.shape[-1]
        previous = self.conv_states[state_idx]
        if previous is not None:
            full = torch.cat([previous, conv_states], dim=-1)
        else:
            full = torch.nn.functional.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
        self.conv_states[state_idx] = full[..., -kernel:].clone()
        self.has_previous_state[state_idx] = True
        self.is_conv_states_initialized[state_idx] = True
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take the new state itself: copying it would cost as much as a small layer."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def append(self, other: LinearRows, rows: Sequence[int]) -> None:
        """Stack rows of another batch below these."""
        for i in range(self.number_of_states):
            self.conv_states[i] = _stacked(self.conv_states[i], other.conv_states[i], rows)
            self.recurrent_states[i] = _stacked(self.recurrent_states[i], other.recurrent_states[i], rows)
            self.has_previous_state[i] = True
            self.is_conv_states_initialized[i] = self.conv_states[i] is not None
            self.is_recurrent_states_initialized[i] = self.recurrent_states[i] is not None

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        for states in (self.conv_states, self.recurrent_states):
            for i in range(self.number_of_states):
                state = states[i]
                if state is not None:
                    states[i] = state[list(rows)]


class BothRows(AttentionRows, LinearRows):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Attention and recurrences side by side in one layer."""

    def __init__(self, window: Window, number_of_states: int) -> None:
        AttentionRows.__init__(self, window)
        LinearRows.__init__(self, number_of_states)


class BatchRows:
    """The rows that go through the model together; row i has `lengths[i]` tokens."""

    def __init__(self, model: Any) -> None:
        """An empty batch for `model` (a transformers causal language model).

        Raises:
            UnsupportedModel: a layer keeps a state that is neither attention nor a recurrence.
        """
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self.lengths: list[int] = []
        self.window = Window()
        self._kept = kept(model.config)
        self.layers = [self._layer(keeps) for keeps in self._kept]
        self.cache = Cache(layers=self.layers)

    def _layer(self, keeps: Keeps) -> Any:
        if keeps.attention:
            return (
                BothRows(self.window, keeps.recurrences) if keeps.recurrences else AttentionRows(self.window)
            )
        return LinearRows(keeps.recurrences) if keeps.recurrences else EmptyLayer()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_columns(self) -> int:
        """Columns in use: the longest row, and what longer rows that left have not given back yet."""
        return self.window.end - self.window.start

    def prefill(self, prompts: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Read prompts into an empty batch, or the next part of each row's.

        Args:
            prompts: token ids per row; shorter ones are padded on the left, which only new rows may be.
            keep: return the logits of so many last columns.

        Returns: [B, keep, V], right-aligned.
        """
        columns = max(map(len, prompts))
        known = self.lengths or [0] * len(prompts)
        assert len(known) == len(prompts)
        assert all(not n or len(p) == columns for n, p in zip(known, prompts, strict=True))
        ids = torch.tensor([[0] * (columns - len(p)) + list(p) for p in prompts], device=self.device)
        pads = torch.tensor([columns - len(p) for p in prompts], device=self.device)
        before = torch.tensor(known, device=self.device)[:, None]
        places = torch.arange(columns, device=self.device)[None] - pads[:, None]
        owned = torch.arange(self.num_columns, device=self.device)[None] >= self.num_columns - before
        mask = torch.cat([owned, places >= 0], dim=1).long()
        logits = self._forward(ids, mask, places.clamp_min(0) + before, keep)
        self.lengths = [n + len(p) for n, p in zip(known, prompts, strict=True)]
        return logits

    def prefill_sharing(self, prompts: Sequence[Sequence[int]], common: int, keep: int) -> Tensor:
        """As `prefill` into an empty batch, where all prompts begin with the same `common` tokens: read once.

        Every row then reads as many last tokens as the longest has after them, so a shorter one reads a part of
        the beginning again, and no padding comes to lie inside a row.
        """
        assert not self.lengths
        assert self.can_share
        first = BatchRows(self.model)
        first.prefill([prompts[0][:common]], 1)
        rest = max(map(len, prompts)) - common
        self.lengths = [max(0, len(p) - rest) for p in prompts]
        self.window.end = common
        for mine, theirs in zip(self.layers, first.layers, strict=True):
            if isinstance(mine, AttentionRows):
                mine.begin_with(theirs, self.lengths, common + rest)
        return self.prefill([p[-rest:] for p in prompts], keep)

    @property
    def can_share(self) -> bool:
        """Whether a row can go on from a part of another's state: a recurrence has only its end."""
        return not any(keeps.recurrences for keeps in self._kept)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token per row. Returns the logits of the next one: [B, V]."""
        assert len(tokens) == len(self.lengths)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        lengths = torch.tensor(self.lengths, device=self.device)[:, None]
        columns = self.num_columns + 1
        mask = None
        if min(self.lengths) + 1 < columns:
            mask = (torch.arange(columns, device=self.device)[None] >= columns - 1 - lengths).long()
        logits = self._forward(ids, mask, lengths, 1)
        self.lengths = [n + 1 for n in self.lengths]
        return logits[:, 0]

    def _forward(self, ids: Tensor, mask: Tensor | None, places: Tensor, keep: int) -> Tensor:
        """ids, places: [B, T]; mask: [B, columns in use + T]."""
        state = reading(self.model, self.cache, places)
        out = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, **state)
        self.window.end += ids.shape[1]
        return out.logits

    def append(self, other: BatchRows, rows: Sequence[int]) -> None:
        """Let rows of another batch join; they become the last ones."""
        if not rows:
            return
        new = [other.lengths[i] for i in rows]
        first = len(self.lengths)
        self._make_room(first + len(rows), max(new), other)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, LinearRows):
                assert isinstance(theirs, LinearRows)
                mine.append(theirs, rows)
            if isinstance(mine, AttentionRows):
                assert isinstance(theirs, AttentionRows)
                for k, row in enumerate(rows):
                    mine.put(first + k, theirs, row, new[k])
        self.lengths += new
        self._trim()

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Let rows leave; the last ones take their places. Returns the old indices in the new order."""
        order = list(range(len(self.lengths)))
        for row in sorted(rows, reverse=True):
            order[row] = order[-1]
            order.pop()
        for layer in self.layers:
            if isinstance(layer, LinearRows):
                layer.select(order)
            if isinstance(layer, AttentionRows):
                for target, source in enumerate(order):
                    if source != target:
                        layer.copy_row(source, target)
        self.lengths = [self.lengths[i] for i in order]
        if self.lengths:
            self._trim()
        else:
            self.reset()
        return order

    def reset(self) -> None:
        """Drop every row and all memory."""
        self.lengths.clear()
        self.window.start = self.window.end = 0
        self.layers[:] = [self._layer(keeps) for keeps in self._kept]

    def _trim(self) -> None:
        """Columns that no row owns any more are not looked at; they are given back when they are the half."""
        window = self.window
        window.start = window.end - max(self.lengths, default=0)
        if window.start > max(window.end // 2, MIN_COLUMNS):
            for layer in self.layers:
                if isinstance(layer, AttentionRows):
                    layer.move_left(len(self.lengths), window.start, window.end)
            window.start, window.end = 0, window.end - window.start

    def _make_room(self, rows: int, columns: int, like: BatchRows) -> None:
        """Buffers for so many rows, whose newest token stands in column `columns` or later."""
        shift = max(0, columns - self.window.end)
        for layer, other in zip(self.layers, like.layers, strict=True):
            if not isinstance(layer, AttentionRows):
                continue
            if not layer.is_initialized:
                assert isinstance(other, AttentionRows)
                assert other.keys is not None
                assert other.values is not None
                layer.keys, layer.values = other.keys[:0, :, :0], other.values[:0, :, :0]
                layer.is_initialized = True
            assert layer.keys is not None
            have_rows, have_columns = layer.keys.shape[0], layer.keys.shape[2]
            need = self.window.end + shift
            if shift or rows > have_rows or need > have_columns:
                layer.resize(
                    have_rows if rows <= have_rows else max(rows, 2 * have_rows),
                    have_columns if need <= have_columns else max(need, 2 * have_columns, MIN_COLUMNS),
                    shift,
                )
        self.window.start += shift
        self.window.end += shift


def token_bytes(config: Any, itemsize: int) -> int:
    """What the keys and values of one token take, over all layers of attention, `itemsize` bytes a number."""
    text = config.get_text_config(decoder=True)
    num_layers = sum(keeps.attention for keeps in kept(config))
    if not num_layers:
        return 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * num_layers * int(heads) * int(size) * itemsize


def _stacked(old: Tensor | None, new: Tensor | None, rows: Sequence[int]) -> Tensor | None:
    if new is None:
        return None
    return new[list(rows)] if old is None else torch.cat([old, new[list(rows)]])
