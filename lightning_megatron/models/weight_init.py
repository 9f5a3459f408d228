"""Draws first weights that are the same under every layout, by the seed and each weight's name.

megatron-core draws each rank's shard from the rank's own random numbers, so that another layout starts another model.
Here a model is built without drawing, then each weight is drawn as a part of the whole one: in tiles, each from a seed
of its own, so that a rank draws its own tiles and no others. They are drawn on the host, in fp32, so that a GPU starts
as a CPU does. What a user's ``build_model`` adds is drawn as torch draws it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from lightning_megatron.checkpoint.tensor_shards import ShardSpec, chunk_shard_specs

Draw = Callable[[torch.Tensor], Any]

_METHODS = ("init_method", "output_layer_init_method", "embedding_init_method")
_TILE = 256  # rows and columns
_EMBEDDING = "embedding.word_embeddings.weight"


class FirstWeights:
    """From when it is made on, megatron-core only notes how it would draw; ``draw`` does it, once the model is built.

    Args:
        *configs: megatron-core's configurations of the model; its layers draw by their ``init_method`` and kin. The
            first one's is the embedding's.
        draws_too: Whether megatron-core is to draw all the same: for layers that may keep their weights elsewhere.
    """

    def __init__(self, *configs: TransformerConfig, draws_too: bool = False) -> None:
        self._draws_too = draws_too
        self._noted: dict[int, tuple[Draw, torch.Tensor]] = {}  # by address; held, so that none is used twice
        self._methods = [(config, name, getattr(config, name)) for config in configs for name in _METHODS]
        self._of_embedding = configs[0].embedding_init_method
        for config, name, method in self._methods:
            setattr(config, name, partial(self._note, method))

    def __deepcopy__(self, _: Any) -> FirstWeights:
        """Itself: shared experts copy their configuration (megatron-core 0.19), and note their weights here, too."""
        return self

    def draw(self, chunk: torch.nn.Module, seed: int, rows: int | None) -> None:
        """Give the chunk that was built its weights, and the configurations their methods back.

        Args:
            chunk: One of the model's chunks.
            seed: Seed of the weights; the same on all ranks.
            rows: Rows of the vocabulary without its padding, which starts at zero; None without a vocabulary.
        """
        for config, name, method in self._methods:
            setattr(config, name, method)
        where = chunk_shard_specs(chunk, rows)
        with torch.no_grad():
            for name, parameter in torch.nn.Module.named_parameters(chunk):
                method, _ = self._noted.get(parameter.data_ptr(), (None, None))
                if method is not None and parameter.device.type != "meta":
                    spec = where[name]
                    if spec.key == _EMBEDDING:  # the last stage's copy is drawn as the embedding, not as it was noted
                        method = self._of_embedding
                    _fill(parameter.data, spec, method, seed)

    def _note(self, method: Draw, weight: torch.Tensor) -> torch.Tensor:
        self._noted[weight.data_ptr()] = method, weight
        if self._draws_too:
            method(weight)
        return weight  # as torch's own do: megatron-core keeps what it is given for the offset of a softmax


def _fill(local: torch.Tensor, spec: ShardSpec, method: Draw, seed: int) -> None:
    """Draw the part of a whole tensor that ``local`` holds."""
    if spec.is_padded:
        local.zero_()
    draw = _draw_whole
    if _is_normal(method):
        draw = {2: _draw_tiles, 3: _draw_matrices}.get(len(spec.shape), _draw_whole)
    for region in spec.regions:
        part = local[_slices(*region.local)]
        on_host = part if part.device.type == "cpu" else torch.empty(part.shape, dtype=part.dtype, device="cpu")
        draw(on_host, region.offset, spec, method, seed)
        if on_host is not part:
            part.copy_(on_host)


def _is_normal(method: Draw) -> bool:
    """Whether it is one of megatron-core's own, which draw element by element: they know of no shape."""
    return isinstance(method, partial) and method.func is torch.nn.init.normal_ and not method.args


def _draw_matrices(part: torch.Tensor, offset: tuple[int, ...], spec: ShardSpec, method: Any, seed: int) -> None:
    """As ``_draw_tiles``, of a stack of matrices, which are drawn one by one: the experts of a layer."""
    first, *inside = offset
    for number, matrix in enumerate(part, start=first):
        one = replace(spec, key=f"{spec.key}.{number}", shape=spec.shape[1:])
        _draw_tiles(matrix, tuple(inside), one, method, seed)


def _draw_tiles(part: torch.Tensor, offset: tuple[int, ...], spec: ShardSpec, method: Any, seed: int) -> None:
    """Fill ``part``, which begins at ``offset`` of the whole tensor, from the tiles that it touches."""

    def draw(tile: tuple[int, ...]) -> None:
        sizes = [min(_TILE, size - number * _TILE) for number, size in zip(tile, spec.shape, strict=True)]
        values = torch.empty(sizes, device="cpu")
        method(values, generator=torch.Generator(device="cpu").manual_seed(_seed(seed, spec.key, *tile)))
        top, left = (number * _TILE - start for number, start in zip(tile, offset, strict=True))
        target = part[max(top, 0) : top + _TILE, max(left, 0) : left + _TILE]
        target.copy_(values[max(-top, 0) :, max(-left, 0) :][: target.size(0), : target.size(1)])

    tiles = list(product(*(range(o // _TILE, -(-(o + n) // _TILE)) for o, n in zip(offset, part.shape, strict=True))))
    workers = min(torch.get_num_threads(), len(tiles))
    if workers == 1:
        deque(map(draw, tiles), maxlen=0)
    else:
        with ThreadPoolExecutor(workers) as pool:  # torch draws on one thread
            deque(pool.map(draw, tiles), maxlen=0)


def _draw_whole(part: torch.Tensor, offset: tuple[int, ...], spec: ShardSpec, method: Draw, seed: int) -> None:
    """As ``_draw_tiles``, by a user's own method: it may look at the shape, and draw from torch's generator."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(_seed(seed, spec.key))
    try:
        whole = torch.empty(spec.shape, device="cpu")
        method(whole)
        part.copy_(whole[_slices(offset, tuple(part.shape))])
    finally:
        torch.set_rng_state(before)


def _slices(offset: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))


def _seed(*parts: object) -> int:
    """A seed for torch's generator on the host, which has 32 bits of it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())
