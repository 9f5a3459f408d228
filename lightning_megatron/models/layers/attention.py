"""Core attention: the fastest of torch's kernels that computes what the layer, the batch and the device ask for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention

from lightning_megatron.distributed.layout import ContextComm
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.layers import capped_attention, flex_attention, sdpa
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, PatternParams, plain_pattern
from lightning_megatron.models.layers.attention_pieces import JOINED, attend_in_pieces
from lightning_megatron.models.layers.attention_sinks import attend_with_sinks, new_sinks
from lightning_megatron.models.layers.context_parallel import all_to_all, ways
from lightning_megatron.models.layers.context_parallel.all_gather import GatheredKeys
from lightning_megatron.models.layers.context_parallel.ring import attend_in_ring
from lightning_megatron.models.layers.recomputed_blocks import ScoreBias, attend_again_in_backward
from lightning_megatron.models.layers.sdpa import Kernel
from lightning_megatron.models.layers.visible_blocks import Visible

AT_ONCE = 1024  # keys up to which scores with a bias, or with a mask of queries and keys, are made at once


class _Looks(NamedTuple):
    """What says who looks at whom, as ``TorchAttention.forward`` is given it."""

    pattern: AttentionPattern | None
    mask: torch.Tensor | None
    bias: Any  # a tensor, a ScoreBias or None
    causal: bool

    def visible(self, length: int, window: int | None, device: torch.device) -> Visible:
        """Who looks at whom in rows of ``length`` keys; a causal layer's tokens do not look ahead unless told."""
        is_plain = self.pattern is None and self.mask is None and (self.causal or window is not None)
        pattern = plain_pattern(length, length, self.causal) if is_plain else self.pattern
        return Visible(pattern, self.mask, window, device, self.causal)


class TorchAttention(torch.nn.Module):
    """Softmax attention over this rank's heads, with grouped queries; built by megatron-core's ``SelfAttention``.

    Args:
        config: Megatron's transformer configuration.
        layer_number: Number of the layer in the whole model, from 1.
        attn_mask_type: Causal, or padding for bidirectional attention.
        attention_type: "self" or "cross".
        attention_dropout: Probability; None takes the configuration's.
        softmax_scale: Factor on the scores; None is one over the root of the head's size.
        **_: Arguments that only other implementations read (process groups).

    Attributes:
        way: How attention reaches across the ranks that share a row (``config.cp_comm_type``); None: no ranks do.

    Raises:
        ValueError: That way cannot compute this layer.
    """

    kernel: str | None = None  # set by ``use_kernel``
    biased = False  # whether a bias is added to the scores
    has_whole_rows = False  # whether each rank is given whole rows, context parallelism notwithstanding

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.is_cross = attention_type == "cross"
        self.causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.score_cap: float | None = getattr(config, "attention_score_cap", None)
        self.softmax_offset: torch.nn.Parameter | None = None  # megatron-core's name of the sinks
        if config.softmax_type == "learnable":
            self.softmax_offset = new_sinks(config)
        self.window = None  # tokens that a query looks at, itself included; ahead as many, unless it is causal
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            if self.is_cross or not (self.causal or config.window_size[0] == config.window_size[1]):
                raise ValueError(
                    f"extra={{'window_size': {config.window_size}}}: a window of cross-attention means nothing, and one"
                    " of attention in both directions reaches equally far in each. Leave it out, or give (64, 64)."
                )
            self.window = config.window_size[0] + 1
        self.way: ContextComm | None = None
        if config.context_parallel_size > 1:
            self.way = ways.chosen(
                config.cp_comm_type,
                cp=config.context_parallel_size,
                tp=config.tensor_model_parallel_size,
                heads=config.num_attention_heads,
                groups=config.num_query_groups or config.num_attention_heads,
                dropout=self.dropout,
                biased=self.biased,
                sinks=self.softmax_offset is not None,
            )
        # Under sequence parallelism megatron-core has entered the tensor-parallel random state around the block.
        self.in_parallel_rng = config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | ScoreBias | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Compute the attention of this rank's heads.

        Under context parallelism ``query``, ``key`` and ``value`` are this rank's shards of rows, the mask or pattern
        is that of whole rows, and the bias has this rank's queries and all keys.

        Args:
            query: ``[s, b, heads/tp, head]``.
            key: ``[s, b, groups/tp, head]``, as ``value``.
            value: ``[s, b, groups/tp, head]``, whose heads may be of another size.
            attention_mask: ``[b, 1, s, s]``, True where a query may not look (Megatron's convention); includes the
                causal part. None is plain causal attention, or none masked.
            attn_mask_type: Overrides the kind that the layer was built with.
            attention_bias: ``[1, heads/tp, s, s]``, added to the scores; the mask then has to hold the causal part. Or
                what makes it of some queries and keys.
            packed_seq_params: ``PatternParams``, which say who looks at whom in place of a mask; or None.

        Returns:
            ``[s, b, heads/tp · head]``, with heads of the values' size.
        """
        causal = self.causal if attn_mask_type is None else attn_mask_type == AttnMaskType.causal
        looks = _Looks(_pattern(packed_seq_params, self.is_cross), attention_mask, attention_bias, causal)
        if self.way is None or self.has_whole_rows:
            return self._whole_rows(query, key, value, looks).flatten(2)
        over_ranks = {"all_gather": self._gathered, "all_to_all": self._by_heads, "ring": self._in_ring}[self.way]
        return over_ranks(query, key, value, looks).flatten(2)

    @property
    def shards_of_queries(self) -> SequenceShards:
        """Which queries of a row this rank has: a decoder's are zig-zag, for causal attention."""
        return SequenceShards.here(zigzag=self.causal or self.is_cross)

    @property
    def shards_of_keys(self) -> SequenceShards:
        """Which keys of a row this rank has: an encoder's are not zig-zag."""
        return SequenceShards.here(zigzag=self.causal)

    def _whole_rows(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, looks: _Looks) -> torch.Tensor:
        """As ``forward``, ``[s, b, heads/tp, head]``, of rows that are whole."""
        if self.softmax_offset is not None:
            return self._with_sinks(query, key, value, looks, self.softmax_offset)
        pattern, mask, window = looks.pattern, looks.mask, self._window(key.size(0))
        if self._is_made_in_parts(looks, key.size(0)):
            with self._randomness() as dropout:
                return self._in_parts(query, key, value, looks, range(query.size(0)), dropout)
        if mask is None and looks.bias is None and pattern is None:
            if window is not None or (looks.causal and self._prefers_flex(query)):
                pattern = plain_pattern(key.size(0), query.size(0), looks.causal)
        elif pattern is None and window is not None:
            unseen = plain_pattern(key.size(0), query.size(0), looks.causal).dense(window, query.device)
            mask = unseen if mask is None else mask | unseen
        with self._randomness() as dropout:
            if pattern is None:
                return self._masked(query, key, value, mask, looks.bias, looks.causal, dropout)
            return self._patterned(query, key, value, pattern, window, dropout)

    def _with_sinks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, looks: _Looks, sinks: torch.Tensor
    ) -> torch.Tensor:
        """As ``_whole_rows``, where each head has a sink; all kernels are those of parts of the keys."""
        pattern, mask, window = looks.pattern, looks.mask, self._window(key.size(0))
        if pattern is None and mask is None and looks.causal:
            pattern = plain_pattern(key.size(0), query.size(0))
        elif mask is not None and window is not None:
            mask = mask | plain_pattern(key.size(0), query.size(0)).dense(window, query.device)
        if self.way == "all_to_all" and not self.has_whole_rows:
            sinks = sinks.chunk(self.shards_of_queries.size)[self.shards_of_queries.rank]
        visible = Visible(pattern, mask, window, query.device)
        return attend_with_sinks(query, key, value, sinks, visible, self.softmax_scale)

    def _gathered(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, looks: _Looks) -> torch.Tensor:
        """As ``_whole_rows``, of shards: the keys of all ranks are collected."""
        gathered = GatheredKeys(key, value, self.shards_of_keys)
        length = gathered.key.size(0)
        pattern, mask, window = looks.pattern, looks.mask, self._window(length)
        made_in_parts = self._is_made_in_parts(looks, length)
        if pattern is None and mask is None and (window is not None or (self.causal and self._prefers_flex(query))):
            pattern = plain_pattern(length, length, self.causal)
        elif mask is not None and window is not None and not made_in_parts:
            mask = mask | plain_pattern(length, length, self.causal).dense(window, query.device)
        parts, found = self.shards_of_queries.parts(query.size(0) * self.shards_of_queries.size), []
        with self._randomness() as dropout:
            for number, (part, each) in enumerate(zip(parts, query.split(len(parts[0])), strict=True)):
                keys = gathered.key, gathered.value
                if made_in_parts:
                    found.append(self._in_parts(each, *keys, looks, part, dropout))
                    continue
                if pattern is not None:
                    of_part = pattern.part(part.start, part.stop)
                    found.append(self._patterned(each, *keys, of_part, window, dropout))
                    continue
                causal = self.causal and mask is None and looks.bias is None
                own = mask[:, :, part.start : part.stop] if mask is not None and mask.size(2) > 1 else mask
                of_bias = None if looks.bias is None else looks.bias[:, :, number * len(part) :][:, :, : len(part)]
                k, v = (x[: part.stop] if causal else x for x in keys)
                found.append(self._masked(each, k, v, own, of_bias, causal, dropout))
        result = torch.cat(found)
        gathered.free_until_gradient_of(result)
        return result

    def _by_heads(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, looks: _Looks) -> torch.Tensor:
        """As ``_whole_rows``, of shards: each rank takes whole rows of some heads. So does a bias of whole rows."""
        of_queries, of_keys = self.shards_of_queries, self.shards_of_keys
        own, bias = query.size(0), looks.bias
        query = all_to_all.whole_rows(query, of_queries)
        key, value = (all_to_all.whole_rows(all_to_all.divisible(x, of_keys.size), of_keys) for x in (key, value))
        if isinstance(bias, ScoreBias):
            bias = bias.of_heads(of_queries.rank, of_queries.size)
        elif bias is not None and bias.size(2) == own:
            bias = all_to_all.whole_rows(bias.permute(2, 0, 1, 3), of_queries).permute(1, 2, 0, 3)
        found = self._whole_rows(query, key, value, looks._replace(bias=bias))
        return all_to_all.own_places(found, of_queries)

    def _in_ring(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, looks: _Looks) -> torch.Tensor:
        """As ``_whole_rows``, of shards: keys and values pass from rank to rank."""
        of_queries, of_keys = self.shards_of_queries, self.shards_of_keys
        length = key.size(0) * of_keys.size
        if looks.bias is not None:
            raise ValueError("cp_comm='ring' takes no bias on the scores. Use cp_comm='all_gather' or 'all_to_all'.")
        visible = looks.visible(length, self._window(length), query.device)
        return attend_in_ring(query, key, value, visible, (of_queries, of_keys), self.softmax_scale, self.score_cap)

    def _prefers_flex(self, query: torch.Tensor) -> bool:
        """Whether plain causal attention is FlexAttention's, too; of torch's kernels it alone caps scores."""
        return self.kernel == "flex" or (self.score_cap is not None and query.is_cuda and self.kernel is None)

    def _window(self, length: int) -> int | None:
        """The window, where rows are longer."""
        return self.window if self.window is not None and self.window < length else None

    @contextmanager
    def _randomness(self) -> Iterator[float]:
        """The dropout of this call, and the random state that it draws from."""
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout and not self.in_parallel_rng else nullcontext():
            yield dropout

    def _is_made_in_parts(self, looks: _Looks, keys: int) -> bool:
        """Whether there is a bias to be made, or a mask of queries and keys that is large."""
        if isinstance(looks.bias, ScoreBias):
            return True
        mask = looks.mask
        of_pairs = mask is not None and (mask.size(2) > 1 or self._window(keys) is not None)
        return keys > AT_ONCE and looks.bias is None and of_pairs

    def _in_parts(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        looks: _Looks,
        places: range,
        dropout: float,
    ) -> torch.Tensor:
        """As ``_whole_rows``, of queries at ``places`` of whole rows; long rows are computed in blocks, twice."""
        length, bias = key.size(0), looks.bias
        visible = looks.visible(length, self._window(length), query.device)
        if bias is None or length > AT_ONCE:
            return attend_again_in_backward(query, key, value, places, visible, bias, self._sdpa(dropout))
        seen, added = visible.seen(places, range(length)), bias.of(bias.table, places, range(length))
        unseen = None if seen is None else ~seen
        return self._masked(query, key, value, unseen, added.to(query.dtype), False, dropout)

    def _patterned(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: AttentionPattern,
        window: int | None,
        dropout: float,
    ) -> torch.Tensor:
        """As ``forward``, ``[s, b, heads/tp, head]``: in blocks, in pieces, or with a mask of queries and keys."""
        if self.kernel in (None, "flex") and len(pattern.queries) > 1:  # a token that is generated has a small mask
            hindered = flex_attention.why_not(query, dropout)
            if not hindered:
                scale, cap = self.softmax_scale, self.score_cap
                found = flex_attention.attend_by_blocks(query, key, value, pattern, window, scale, cap)
                if found is not None:
                    return found
            elif self.kernel == "flex":
                raise ValueError(f"Kernels(attention='flex'): {hindered}. Leave attention out.")
        # A token that is generated has a small mask on a GPU; kernels that take no mask refuse, whatever the data.
        in_one = len(pattern.queries) == 1 or self.kernel in sdpa.MASKLESS
        if pattern.length > JOINED and (query.device.type == "cpu" or not in_one):
            return attend_in_pieces(query, key, value, pattern, window, self._sdpa(dropout))
        mask = pattern.dense(window, query.device)
        return self._masked(query, key, value, mask, None, False, dropout)

    def _masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        causal: bool,
        dropout: float,
    ) -> torch.Tensor:
        """As ``forward``, ``[s, b, heads/tp, head]``."""
        causal = causal and mask is None and bias is None
        kernel = self._sdpa(dropout)
        # Rows that are further heads have their output laid out as the next layer takes it; one token's always is.
        if bias is not None or (mask is not None and mask.size(0) > 1) or query.size(0) == 1:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, head]
            return kernel(q, k, v, _added_to_scores(mask, bias), causal).permute(2, 0, 1, 3)
        q, k, v = (x.flatten(1, 2).transpose(0, 1)[None] for x in (query, key, value))  # [1, b · n, s, head]
        found = kernel(q, k, v, _added_to_scores(mask, bias), causal)[0].transpose(0, 1)  # [s, b · n, head of values]
        return found.reshape(*query.shape[:-1], value.size(-1))

    def _sdpa(self, dropout: float) -> Kernel:
        if self.score_cap is not None:
            return functools.partial(
                capped_attention.attend, cap=self.score_cap, dropout=dropout, scale=self.softmax_scale
            )
        backend = None if self.kernel == "flex" else self.kernel
        return functools.partial(sdpa.attend, dropout=dropout, scale=self.softmax_scale, backend=backend)


def use_kernel(chunks: Iterable[torch.nn.Module], kernel: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Have the attention of all layers computed by ``kernel``, a name of ``Kernels.attention``.

    Raises:
        ValueError: It cannot compute in ``dtype``, or does not cap scores as the model does.
    """
    if device.type == "cuda" and kernel in ("flash", "cudnn") and dtype == torch.float32:
        raise ValueError(
            f"Kernels(attention={kernel!r}) computes in bf16 and fp16, and this model in fp32. Use"
            " Trainer(precision='bf16-mixed'), or attention='efficient', or leave attention out."
        )
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TorchAttention):
                if module.score_cap is not None and kernel in ("flash", "cudnn", "efficient"):
                    raise ValueError(
                        f"Kernels(attention={kernel!r}): torch's back end of this name has no cap on the scores, and"
                        f" this model has attention_score_cap={module.score_cap}. Leave attention out, or use 'flex' or"
                        " 'math'."
                    )
                if module.softmax_offset is not None and kernel is not None:
                    raise ValueError(
                        f"Kernels(attention={kernel!r}): this model has sinks (attention_sinks=True), which back ends"
                        " of torch's do not know. Leave attention out."
                    )
                module.kernel = kernel


def pad_mask(
    mask: AttentionPattern | torch.Tensor | None, queries: int, keys: int
) -> AttentionPattern | torch.Tensor | None:
    """A mask for ``queries`` and ``keys`` more tokens at the end: no query looks at the new keys but new queries.

    Args:
        mask: ``[b, 1, s or 1, s]``, True where a query may not look; or a pattern; None stays None.
        queries: Tokens to add to the dimension of the queries, unless that is 1.
        keys: Tokens to add to the dimension of the keys.
    """
    if mask is None:
        return None
    if isinstance(mask, AttentionPattern):
        return mask.padded(keys, queries)
    mask = F.pad(mask, (0, keys), value=True)
    return F.pad(mask, (0, 0, 0, queries), value=False) if mask.size(-2) > 1 else mask  # a softmax needs a key


def _pattern(params: Any, is_cross: bool) -> AttentionPattern | None:
    if params is None:
        return None
    if not isinstance(params, PatternParams):
        raise ValueError("TorchAttention takes no packed sequences of megatron-core's; give an AttentionPattern.")
    return params.crossing if is_cross else params.pattern


def _added_to_scores(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """torch's ``attn_mask``: True where a query may look, or numbers where there is a bias."""
    if bias is None:
        return None if mask is None else ~mask
    return bias if mask is None else bias.masked_fill(mask, float("-inf"))
