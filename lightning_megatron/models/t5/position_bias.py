"""T5's relative position bias: a number for each head and distance, which is added to the scores of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.tensor_parallel import scatter_to_tensor_model_parallel_region


@dataclass(frozen=True)
class DistanceBias:
    """The bias of some heads, made for the queries and keys that are asked for.

    Args:
        embedding: A stack's table, of all heads, and how it parts distances into buckets.
        table: ``[buckets, heads]``, the part of it that these heads read.
    """

    embedding: RelativePositionEmbedding
    table: torch.Tensor

    @classmethod
    def here(cls, embedding: RelativePositionEmbedding) -> DistanceBias:
        """The bias of this tensor-parallel rank's heads; the gradients of all ranks' heads are joined."""
        table = embedding.relative_attention_bias
        # A call of the module, before which data parallelism waits for weights that are still on their way.
        rows = table(torch.arange(table.num_embeddings, device=table.weight.device))
        return cls(embedding, scatter_to_tensor_model_parallel_region(rows))

    def of_heads(self, part: int, parts: int) -> DistanceBias:
        """The bias of one of equally many heads each."""
        return replace(self, table=self.table.chunk(parts, dim=1)[part])

    def of(self, table: torch.Tensor, queries: range, keys: range) -> torch.Tensor:
        """``[1, heads, queries, keys]`` of ``table``; of rows of one distance each, one value is made."""
        first, last = keys.start - queries.stop + 1, keys.stop - queries.start
        embedding, distances = self.embedding, torch.arange(first, last, device=table.device)
        buckets = embedding._relative_position_bucket(
            distances,
            bidirectional=embedding.bidirectional,
            num_buckets=embedding.relative_attention_num_buckets,
            max_distance=embedding.relative_attention_max_distance,
        )
        values = F.embedding(buckets, table)  # [distances, heads]
        of_queries = values.unfold(0, len(keys), 1).flip(0)  # [queries, heads, keys]; the last query's come first
        return of_queries.transpose(0, 1)[None]


def heads_of_bias(embedding: RelativePositionEmbedding, queries: int, keys: int) -> torch.Tensor:
    """This rank's heads of a stack's bias, ``[1, heads/tp, queries, keys]``; the last query is the last key."""
    bias = DistanceBias.here(embedding)
    return bias.of(bias.table, range(keys - queries, keys), range(keys))
