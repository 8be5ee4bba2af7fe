"""Keys and values for ragged rows. There is no rollback: windows are written past `lengths`, and `commit` moves `lengths`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .errors import CacheError
from .recurrent import Cell, HookedLayer, LayerPlan, RecurrentLayer
from .state import Window

BUCKET, LEAST_BUCKET = 64, 16
"""Slots become visible in multiples of 64 for one row, of 16 for many: slots that are looked at in vain cost by the row, while a
graph is found to hold for a new size once for all rows."""

RECORDED = 4
"""How many times larger the steps are on a GPU, where each size is recorded (`captured.py`), and looking at slots is cheap."""


def bucket(num_rows: int, device: str = "cpu") -> int:
    """How many slots become visible at a time: 64, 32, 16, 16, ... by the number of rows; 256, 128, 64, 64, ... on a GPU."""
    return max(BUCKET // num_rows // LEAST_BUCKET, 1) * LEAST_BUCKET * (RECORDED if device == "cuda" else 1)


class KVCacheManager(ABC):
    """Keys and values of one model, for B rows.

    `window` hands out the slots past `lengths`, `commit` moves `lengths`, and what was not committed is overwritten by the next
    window:

        lengths 4   slots  k k k k | w w w w      window(4)  writes w, moves nothing
        commit 2    slots  k k k k k k | . .      lengths 6

    lengths  (B,) int64 on the device; `commit` is the only method that changes it
    """

    lengths: Tensor

    @abstractmethod
    def window(self, num_tokens: int, offset: Tensor | None = None) -> Window:
        """Positions (B, T), mask and the transformers Cache for the T = num_tokens slots past `lengths + offset`.

        offset (B,) int64 skips slots that the last window wrote and nobody committed yet; none: 0.
        """

    @abstractmethod
    def commit(self, counts: Tensor) -> None:
        """Keep the first counts[b] tokens past `lengths` in row b. counts (B,), 0 <= counts <= what was written."""

    @property
    def transformers_cache(self) -> Cache | None:
        """The transformers Cache of every window, where it is always the same one: what follows its layers can then be registered
        around a round. None: it is registered around each window."""
        return None

    def kept(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """A layer's keys and values (B, H, S, Dh), to be looked at; what lies past `lengths` is not committed. None: it has none.

        Raises CacheError where the manager does not say.
        """
        raise CacheError(
            f"{type(self).__name__} was asked for the keys of layer {layer}; it has no method kept(layer) that shows them. "
            "Write one, or use RaggedCache or CropCache."
        )

    @abstractmethod
    def reserve(self, num_slots: int) -> None:
        """Make sure that windows up to slot `num_slots` fit."""

    def cleared(self, layout: CacheLayout, num_layers: int, num_rows: int, device: torch.device) -> bool:
        """Forget every token and keep the memory, as new for a call that asks for these. False: it cannot; a new one is made."""
        return False


class CacheLayout:
    """What a manager must know of a model: its layer types, their windows and its attention implementation.

    plans           what each layer holds; none: keys and values in every layer
    prompt_lengths  (B,) how many tokens of each row are given, which some recurrences read otherwise than those that are written
    """

    def __init__(
        self,
        windows: Mapping[str, int | None],
        attention: str,
        dtype: torch.dtype,
        plans: Sequence[LayerPlan] = (),
        prompt_lengths: Tensor | None = None,
    ) -> None:
        self.windows, self.attention, self.dtype, self.plans = dict(windows), attention, dtype, tuple(plans)
        self.prompt_lengths = prompt_lengths

    def agrees(self, other: CacheLayout) -> bool:
        """Whether one cache does for both, whatever prompts it is filled from."""
        ours, theirs = ((each.windows, each.attention, each.dtype, each.plans) for each in (self, other))
        return ours == theirs

    def mask(self, positions: Tensor, num_slots: int) -> Tensor | dict[str, Tensor | None]:
        """positions (B, T) -> (B, 1, T, num_slots): a slot is seen from its own position on, while the window reaches it.

        positions 2 3     slots 0 1 2 3        full 1 1 1 0     sliding 2  0 1 1 0
                                                    1 1 1 1                0 0 1 1
        """
        masks: dict[str, Tensor | None] = {plan.layer_type: None for plan in self.plans if plan.num_states or not plan.keys}
        masks |= {name: self._mask(positions, num_slots, window) for name, window in self.windows.items()}
        masks |= {plan.layer_type: torch.ones_like(positions, dtype=torch.bool) for plan in self.plans if plan.aligned}
        return masks if len(masks) > 1 else next(mask for mask in masks.values() if mask is not None)

    def _mask(self, positions: Tensor, num_slots: int, window: int | None) -> Tensor:
        distance = positions[:, None, :, None] - torch.arange(num_slots, device=positions.device)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if self.attention == "sdpa":
            return seen
        return torch.where(seen, 0.0, torch.finfo(self.dtype).min).to(self.dtype)


class RaggedCache(KVCacheManager):
    """Static slots and per-row lengths: O(1) commit, no copy, any batch.

    Slots grow in buckets when `reserve` asks for more; sliding layers keep all slots and have their window in the mask. Another
    call may have the slots again (`cleared`): windows then see few of them at first, and each is wiped before it is seen.
    """

    def __init__(self, layout: CacheLayout, num_layers: int, num_rows: int, device: torch.device) -> None:
        self.layout = layout
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._made_for = (num_layers, num_rows, device, _mode(device))
        self._slots = _Slots(num_rows, device)
        plans = layout.plans or (LayerPlan("full_attention"),)
        self._cache = _RaggedLayers(self._slots, [_layer_for(plans[i % len(plans)], self._slots) for i in range(num_layers)])
        self._recurrent = [layer for layer in self._cache.layers if isinstance(layer, RecurrentLayer)]

    def window(self, num_tokens: int, offset: Tensor | None = None) -> Window:
        start = self.lengths if offset is None else self.lengths + offset
        positions = start[:, None] + torch.arange(num_tokens, device=start.device)
        self._slots.written = positions
        prompt = None if self.layout.prompt_lengths is None else self.layout.prompt_lengths - start
        for layer in self._recurrent:
            layer.open(num_tokens, offset, prompt)
        return Window(positions, self.layout.mask(positions, self.num_slots), self._cache)

    def commit(self, counts: Tensor) -> None:
        self.lengths = self.lengths + counts
        for layer in self._recurrent:
            layer.commit(counts)

    def kept(self, layer: int) -> tuple[Tensor, Tensor] | None:
        held: Any = self._cache.layers[layer]
        seen = slice(self._slots.num_visible)
        is_written = held.is_initialized and self._slots.written.shape[1]
        return (held.keys[:, :, seen], held.values[:, :, seen]) if is_written else None

    @property
    def transformers_cache(self) -> Cache:
        return self._cache

    @property
    def layers(self) -> list[Any]:
        """What is held of each layer."""
        return list(self._cache.layers)

    @property
    def num_slots(self) -> int:
        """How many slots windows may use, and how many they look at."""
        return self._slots.num_visible

    @property
    def sizes(self) -> tuple[int, int]:
        """Slots, and tokens of the last window: while these stay, so does every shape that is held here."""
        return self.num_slots, self._slots.written.shape[1]

    def reserve(self, num_slots: int) -> None:
        if num_slots > self.num_slots:
            first, size = self.num_slots, bucket(len(self.lengths), self.lengths.device.type)
            self._slots.numbers = torch.arange(-(-num_slots // size) * size, device=self.lengths.device)
            for layer in self._cache.layers:
                if isinstance(layer, _RaggedLayer) and layer.is_initialized:
                    layer.grow()
                    layer.wipe(first, min(self.num_slots, self._slots.num_used))

    def cleared(self, layout: CacheLayout, num_layers: int, num_rows: int, device: torch.device) -> bool:
        asked = (num_layers, num_rows, device, _mode(device))
        if type(self) is not RaggedCache or asked != self._made_for or not layout.agrees(self.layout):
            return False  # of a subclass nobody knows what else it holds
        self.layout, self.lengths = layout, torch.zeros_like(self.lengths)
        self._slots.clear()
        for layer in self._recurrent:
            layer.forget()
        return True

    def growing(self) -> list[tuple[Tensor, int]]:
        """(tensor, axis): the sizes that change when slots grow, or with the last window, for a compiler to leave open."""
        layers = [layer for layer in self._cache.layers if isinstance(layer, _RaggedLayer) and layer.is_initialized]
        held = [(tensor, 2) for layer in layers for tensor in layer.held()]
        tapes = [(tape, tape.dim() - 1) for layer in self._recurrent for tape in layer.tapes]
        return [(self._slots.numbers, 0), (self._slots.written, 1), *held, *tapes]

    def moving(self) -> list[Cell]:
        """Where every tensor is held that a round reads and exchanges for another one. Keys and values are written in place."""
        cells: list[Cell] = [(vars(self), "lengths"), (vars(self._slots), "written")]
        return cells + [cell for layer in self._recurrent for cell in layer.moving()]


def _mode(device: torch.device) -> tuple[object, ...]:
    """What decides, besides the model, of which kind and type its keys are."""
    is_cast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.is_inference_mode_enabled(), torch.get_autocast_dtype(device.type) if is_cast else None


class _Slots:
    """Where the current window writes and how far it sees; shared by all layers of one cache.

    num_used  slots below this one may hold what an earlier call wrote
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.written = torch.zeros(num_rows, 0, dtype=torch.long, device=device)
        self.numbers = torch.arange(0, device=device)
        self.num_used = 0
        self._rows = torch.arange(num_rows, device=device)[:, None, None]
        self._heads: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Nobody sees a slot any more."""
        self.num_used = max(self.num_used, self.num_visible)
        self.written, self.numbers = self.written[:, :0], self.numbers[:0]

    def write(self, slots: Tensor, states: Tensor) -> None:
        """slots (B, H, S, Dh) with states (B, H, T, Dh) written in place: a compiled round hands no tensor back."""
        if len(slots) == 1:  # one index to move, not three
            slots.index_copy_(2, self.written[0].to(states.device), states)
            return
        places = (place.to(states.device) for place in self._places(states.shape[1]))
        slots.index_put_(tuple(places), states)  # scatter_ takes as long as there are slots

    def _places(self, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, 1, 1), heads (H, 1) and slots (B, 1, T) that a layer of so many heads writes."""
        if num_heads not in self._heads:
            self._heads[num_heads] = torch.arange(num_heads, device=self._rows.device)[:, None]
        return self._rows, self._heads[num_heads], self.written[:, None]

    @property
    def num_visible(self) -> int:
        """How far windows see."""
        return self.numbers.shape[0]

    @property
    def positions(self) -> Tensor:
        """(3, B, S): a slot's number is its position, in every dimension."""
        return torch.arange(self.num_visible, device=self.written.device).expand(3, self.written.shape[0], -1)


class _RaggedLayers(Cache):
    """The layers of a `RaggedCache`, for transformers to read and write."""

    def __init__(self, slots: _Slots, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self._slots = slots

    @property
    def position_ids(self) -> Tensor:
        """What stood before the window, for indexers that pool keys and rotate them anew (transformers 5.17 keeps it here)."""
        return self._slots.positions

    @position_ids.setter
    def position_ids(self, positions: Tensor) -> None:
        """Slots are where they are: what transformers sets is known."""


class _RaggedLayer(CacheLayerMixin):
    """One layer's keys and values (B, H, S, Dh), written at each row's own slots."""

    is_sliding = False
    is_compileable = True

    def __init__(self, slots: _Slots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots
        self.index_keys: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self._is_full(self.keys):
            self.grow()
        self._slots.write(self.keys, key_states)
        self._slots.write(self.values, value_states)
        return self.keys[:, :, : self._slots.num_visible], self.values[:, :, : self._slots.num_visible]

    def grow(self) -> None:
        """Room for all visible slots, made outside of a round."""
        self.keys, self.values = self._roomy(self.keys), self._roomy(self.values)
        self.index_keys = None if self.index_keys is None else self._roomy(self.index_keys)

    def held(self) -> list[Tensor]:
        """All that has slots, (B, H, S, Dh) each."""
        return [tensor for tensor in (self.keys, self.values, self.index_keys) if tensor is not None]

    def wipe(self, first: int, last: int) -> None:
        """Zeros into slots that are about to be seen: a mask hides numbers, but not what is none (0 times nan is nan)."""
        for tensor in self.held() if last > first else ():
            tensor[:, :, first:last] = 0

    def update_index(self, idx_k: Tensor) -> Tensor:
        """An indexer's keys (B, 1, T, Di), by which queries choose what they attend to -> (B, 1, S, Di).

        Slots that nobody wrote, or that are not committed, lie behind the window: models mask them out before they choose.
        """
        if self.index_keys is None or self._is_full(self.index_keys):
            self.index_keys = self._roomy(idx_k[:, :, :0] if self.index_keys is None else self.index_keys)
        self._slots.write(self.index_keys, idx_k)
        return self.index_keys[:, :, : self._slots.num_visible]

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """The same without the axis of heads, as models of DeepSeek's kind have it: (B, T, Di) -> (B, S, Di)."""
        return self.update_index(indexer_key_states[:, None])[:, 0]

    @property
    def indexer_position_ids(self) -> Tensor:
        """The same as `_RaggedLayers.position_ids`, where transformers 5.23 keeps it."""
        return self._slots.positions

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor) -> None:
        """Slots are where they are: what transformers sets is known."""

    def _is_full(self, slots: Tensor) -> bool:
        """Never while there is just enough: a compiler would take the two sizes for one."""
        return slots.shape[2] <= self._slots.num_visible

    def _roomy(self, slots: Tensor | None) -> Tensor:
        """With room for more than the visible slots: if at all, at least twice as many as before, so that all growth together
        copies each of them about once."""
        assert slots is not None
        rows, heads, old, width = slots.shape
        if not self._is_full(slots):
            return slots
        grown = slots.new_zeros(rows, heads, max(self._slots.num_visible + BUCKET, 2 * old), width)
        grown[:, :, :old] = slots
        return grown

    def get_seq_length(self) -> int:
        return self._slots.num_visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.num_visible, 0

    def get_max_length(self) -> int:
        return -1


class _RaggedRecurrentLayer(_RaggedLayer, RecurrentLayer):  # type: ignore[misc]  # transformers' two kinds of layers differ
    """Keys and values, and states besides: attention with short convolutions around it."""

    def __init__(self, slots: _Slots, plan: LayerPlan) -> None:
        _RaggedLayer.__init__(self, slots)
        RecurrentLayer.__init__(self, plan)


class _AlignedLayer(_RaggedLayer):
    """Lends every row so that its window ends where the cache does: for models that find their queries' places by its length.

    slots  a b c d . .      lent  0 0 a b c d      What stands before a row is 0. So is what such a model stores beside a key
           x y . . . .            0 0 0 0 x y      to say that there is one (GLM-5.3-Flash).
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        return self._aligned(keys), self._aligned(values)

    def update_index(self, idx_k: Tensor) -> Tensor:
        return self._aligned(super().update_index(idx_k))

    def _aligned(self, slots: Tensor) -> Tensor:
        """slots (B, H, S, Dh), moved in every row."""
        empty = slots.shape[2] - 1 - self._slots.written[:, -1:].to(slots.device)
        place = (torch.arange(slots.shape[2], device=slots.device) - empty)[:, None, :, None]
        return slots.gather(2, place.clamp(min=0).expand_as(slots)).masked_fill(place < 0, 0)


class _CompressedLayer(_RaggedLayer, HookedLayer):
    """Keys and values, and one more key for every whole block of tokens (DeepSeek-V4).

    No block is kept, for its tokens may yet be refused. What each token gives to its block lies at the token's own slot, and
    every window compresses all slots anew: a block that is not whole is compressed too, and no query sees it.

        tokens  a b c d | e f g     block size 4     blocks  [abcd] [efg.]     f, behind e, sees e f and [abcd]
    """

    def __init__(self, slots: _Slots, plan: LayerPlan) -> None:
        super().__init__(slots)
        assert plan.mixer is not None
        self._compressor, self._size = plan.mixer, plan.block_size
        self._given: dict[str, Tensor] = {}

    def grow(self) -> None:
        super().grow()
        self._given = {name: self._roomy(given) for name, given in self._given.items()}

    def held(self) -> list[Tensor]:
        return [*super().held(), *self._given.values()]

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        """kv, gate (B, T, d), what the window's tokens give -> the same of all slots, and where the first block begins."""
        given, old = torch.cat([kv, gate], dim=-1)[:, None], self._given.get(name)
        if old is None or self._is_full(old):
            self._given[name] = self._roomy(given[:, :, :0] if old is None else old)
        self._slots.write(self._given[name], given)
        num_slots = self._slots.num_visible // self._size * self._size
        all_kv, all_gate = self._given[name][:, 0, :num_slots].chunk(2, dim=-1)
        return all_kv, all_gate, 0

    def update_overlap_state(self, *args: Any) -> tuple[None, None]:
        """What the block before the first one gave to it: there is none before slot 0."""
        return None, None

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """compressed (B, blocks, d), all of them."""
        return compressed

    def hooks(self) -> list[Any]:
        return [self._compressor.register_forward_hook(self._masked)]

    def _masked(self, _: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """For a single token the model takes every block to be whole: mask here as it does for several.

        output: blocks (B, 1, blocks, d), and what to add to their scores (B, 1, T, blocks)
        """
        (blocks, bias), positions = output, inputs[2]
        if bias is not None:
            return blocks, bias
        num_whole = (positions + 1) // self._size
        later = torch.arange(blocks.shape[2], device=blocks.device) >= num_whole[:, None, :, None]
        return blocks, torch.zeros_like(later, dtype=blocks.dtype).masked_fill(later, float("-inf"))


def _layer_for(plan: LayerPlan, slots: _Slots) -> Any:
    if plan.block_size:
        return _CompressedLayer(slots, plan)
    if not plan.keys:
        return RecurrentLayer(plan)
    if plan.aligned:
        return _AlignedLayer(slots)
    return _RaggedRecurrentLayer(slots, plan) if plan.num_states else _RaggedLayer(slots)


class _CroppedLayer(DynamicLayer):
    """transformers' growing layer, with an indexer's keys (B, 1, S, Di) beside keys and values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index_keys: Tensor | None = None

    def update_index(self, idx_k: Tensor) -> Tensor:
        self.index_keys = idx_k if self.index_keys is None else torch.cat([self.index_keys, idx_k], dim=2)
        return self.index_keys

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        return self.update_index(indexer_key_states[:, None])[:, 0]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.index_keys is not None and tokens_to_remove:
            self.index_keys = self.index_keys[:, :, :tokens_to_remove]


class CropCache(KVCacheManager):
    """The slow, obvious twin of `RaggedCache`: transformers' growing cache, cropped back before every window. One row."""

    def __init__(self, layout: CacheLayout, num_layers: int, num_rows: int, device: torch.device) -> None:
        if num_rows != 1:
            raise CacheError(f"CropCache was asked to hold {num_rows} rows; it holds 1. Use RaggedCache for batches.")
        recurrent = sorted({plan.layer_type for plan in layout.plans if plan.num_states or plan.block_size})
        if recurrent:
            raise CacheError(
                f"CropCache was asked to hold layers of type {', '.join(recurrent)}; a state cannot be cropped, nor a "
                "compressed block. Use RaggedCache."
            )
        self.layout = layout
        self.lengths = torch.zeros(1, dtype=torch.long, device=device)
        self._cache = Cache(layers=[_CroppedLayer() for _ in range(num_layers)])
        self._num_written = 0

    def window(self, num_tokens: int, offset: Tensor | None = None) -> Window:
        start = int(self.lengths) + (0 if offset is None else int(offset))
        if start > self._num_written:
            raise CacheError(
                f"A window was asked for at slot {start}; only {self._num_written} were ever written. Give a smaller offset."
            )
        layers: list[Any] = self._cache.layers
        for layer in layers:  # one by one: not every layer of a head took part in the last window
            layer.crop(min(start - layer.get_seq_length(), 0))
        self._num_written = start + num_tokens
        positions = torch.arange(start, self._num_written, device=self.lengths.device)[None]
        return Window(positions, self.layout.mask(positions, self._num_written), self._cache)

    def commit(self, counts: Tensor) -> None:
        if int(self.lengths + counts) > self._num_written:
            raise CacheError(
                f"{int(counts)} tokens were to be kept past slot {int(self.lengths)}; {self._num_written} are written. "
                "Commit no more than the last window held."
            )
        self.lengths = self.lengths + counts

    @property
    def transformers_cache(self) -> Cache:
        return self._cache

    def kept(self, layer: int) -> tuple[Tensor, Tensor] | None:
        held: Any = self._cache.layers[layer]
        return (held.keys, held.values) if held.is_initialized else None

    def reserve(self, num_slots: int) -> None:
        """Nothing: this cache grows by itself."""
