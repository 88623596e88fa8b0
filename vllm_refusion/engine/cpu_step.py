"""What vLLM's model runner does around a forward pass in Triton kernels of its own, in PyTorch.

On a CPU Triton's interpreter runs those kernels: some milliseconds for every request of a step,
which is most of a small model's time. Each function is the twin of vLLM's of that name, for what
ReFusion models ask of it (``compat`` says when that is).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _rows_of(starts: Tensor, requests: int) -> tuple[Tensor, Tensor]:
    """Of rows that begin at ``starts`` [>= requests + 1]: each one's request and place in it."""
    counts = starts[: requests + 1].diff()
    request = torch.arange(requests, device=starts.device).repeat_interleave(counts)
    place = torch.arange(len(request), device=starts.device) - starts[request]
    return request, place


def apply_write(
    tensor: Tensor,
    rows: Sequence[int],
    starts: Sequence[int],
    contents: Sequence[int | float],
    ends: Sequence[int],
) -> None:
    """The n-th write: what comes before ``ends[n]`` of ``contents``, into a row from a start on."""
    content = torch.tensor(contents, dtype=tensor.dtype)
    table = tensor.view(tensor.shape[0], -1)  # a row may be a single number
    begin = 0
    for row, start, end in zip(rows, starts, ends, strict=True):
        table[row, start : start + end - begin] = content[begin:end]
        begin = end


def gather_block_tables(
    idx_mapping: Tensor, tables: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """Rows of ``tables`` in the order of the batch; those behind it become 0."""
    for table, gathered in zip(tables, out, strict=True):
        gathered[: len(idx_mapping)] = table[idx_mapping]
        gathered[len(idx_mapping) :] = 0


def compute_slot_mappings(
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    tables: Sequence[Tensor],
    block_sizes: Sequence[int],
    pad: int,
    out: Tensor,
) -> None:
    """KV entries [groups, rows] of rows at ``positions``; ``pad`` where there is no request."""
    request, _ = _rows_of(query_start_loc, len(idx_mapping))
    req, at = idx_mapping[request].long(), positions[: len(request)]
    for group, (table, size) in enumerate(zip(tables, block_sizes, strict=True)):
        entries = table[req.clamp_min(0), at // size].long() * size + at % size
        out[group, : len(request)] = torch.where(req < 0, pad, entries)
        out[group, len(request) :] = pad


def prepare_prefill_inputs(
    input_ids: Tensor,
    next_prefill_tokens: Tensor,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    all_token_ids: Tensor,
    prefill_len: Tensor,
    num_computed_tokens: Tensor,
) -> None:
    """The next tokens of requests within their prompts, and those behind them as a look ahead."""
    requests = len(idx_mapping)
    request, place = _rows_of(query_start_loc, requests)
    computed, length = num_computed_tokens[idx_mapping], prefill_len[idx_mapping]
    prefills = computed < length
    row = prefills[request].nonzero()[:, 0]
    at = (computed[request] + place)[row]
    input_ids[row] = all_token_ids[idx_mapping[request[row]].long(), at.long()]
    ends = computed + query_start_loc[: requests + 1].diff()
    req, length, ends = (t[prefills].long() for t in (idx_mapping, length, ends))
    last = all_token_ids.shape[1] - 1
    for ahead, tokens in enumerate(next_prefill_tokens):
        found = all_token_ids[req, (ends + ahead).clamp_max(last)]
        tokens[req] = torch.where(ends + ahead < length, found, 0).to(tokens.dtype)


def prepare_pos_seq_lens(
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    num_computed_tokens: Tensor,
    pos: Tensor,
    seq_lens: Tensor,
) -> None:
    requests = len(idx_mapping)
    request, place = _rows_of(query_start_loc, requests)
    computed = num_computed_tokens[idx_mapping]
    pos[: len(request)] = computed[request] + place
    seq_lens[:requests] = computed + query_start_loc[: requests + 1].diff()
    seq_lens[requests:] = 0


def combine_sampled_and_draft_tokens(
    input_ids: Tensor,
    idx_mapping: Tensor,
    last_sampled_tokens: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    prefill_len: Tensor,
    draft_tokens: Tensor,
    cu_num_logits: Tensor,
    num_logits: int,
) -> Tensor:
    """Feeds decoding requests their drafts, which all logits are of; returns their rows.

    Requests whose ``seq_lens`` end within their prompts keep what they were given.
    """
    requests = len(idx_mapping)
    request, place = _rows_of(cu_num_logits, requests)
    first = query_start_loc[1 : requests + 1] - cu_num_logits[: requests + 1].diff()
    rows = input_ids.new_zeros(num_logits, dtype=torch.int64)
    rows[: len(request)] = first[request] + place
    decodes = (seq_lens[:requests] > prefill_len[idx_mapping])[request]
    drafts = draft_tokens[idx_mapping[request[decodes]].long(), place[decodes].long()]
    input_ids[rows[: len(request)][decodes]] = drafts.to(input_ids.dtype)
    return rows


def expand_idx_mapping(
    idx_mapping: Tensor, total_num_logits: int, cu_num_logits: Tensor, max_expand_len: int
) -> tuple[Tensor, Tensor]:
    """The request of each row of logits, and the row's place among the request's."""
    request, place = _rows_of(cu_num_logits, len(idx_mapping))
    expanded = idx_mapping.new_zeros(total_num_logits)
    expanded[: len(request)] = idx_mapping[request]
    places = idx_mapping.new_zeros(total_num_logits, dtype=torch.int32)
    places[: len(request)] = place
    return expanded, places


def post_update(
    idx_mapping: Tensor,
    num_computed_tokens: Tensor,
    last_sampled_tokens: Tensor,
    sampled_tokens: Tensor,
    num_sampled: Tensor,
    num_rejected: Tensor,
    query_start_loc: Tensor | None,
    all_token_ids: Tensor,
    total_len: Tensor,
) -> None:
    """Takes a step's tokens into account; requests of a negative index have left."""
    counts = torch.where(idx_mapping < 0, 0, num_sampled)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    request, place = _rows_of(starts, len(idx_mapping))
    req = idx_mapping[request].long()
    tokens = sampled_tokens[request, place].to(all_token_ids.dtype)
    all_token_ids[req, (total_len[req] + place).long()] = tokens
    ends = (counts > 0).nonzero()[:, 0]
    last = sampled_tokens[ends, counts[ends].long() - 1]
    last_sampled_tokens.view(-1)[idx_mapping[ends].long()] = last.to(last_sampled_tokens.dtype)
    alive = idx_mapping >= 0
    req = idx_mapping[alive].long()
    total_len[req] += counts[alive].to(total_len.dtype)
    rows = -num_rejected
    if query_start_loc is not None:
        rows = query_start_loc[: len(idx_mapping) + 1].diff() - num_rejected
    num_computed_tokens[req] += rows[alive].to(num_computed_tokens.dtype)
