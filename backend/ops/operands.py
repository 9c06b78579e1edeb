"""What the ops take besides tensors: weights in their stored variants and the description of one step's batch.

Tokens of a step are laid out as

    [ decode 0 | decode 1 | ... | prefill chunk 0 ......... | prefill chunk 1 ... ]
      one token a row, num_decodes rows      the remaining rows, in order

A row is one sequence. Every tensor of a batch lives on the device of the KV cache; the plain integers live on the host, so an op
chooses its kernel and its launch sizes without waiting for the device.
"""

from dataclasses import dataclass, field

import torch

__all__ = [
    "Added",
    "AttentionBatch",
    "DenseWeight",
    "Fp8Weight",
    "KvPages",
    "LinearWeight",
    "NormWeight",
    "Projected",
    "QkvBeforeRotary",
    "QkvWeights",
    "QuantizedPages",
    "QuantizedRows",
    "SamplingBatch",
    "SplitSums",
    "StaticInt8Pages",
    "Unadded",
    "W4A16Tiles",
    "W4A16Weight",
    "W8A8Weight",
    "parts_of",
    "stream_after",
    "whole",
]


@dataclass(frozen=True, slots=True)
class SplitSums:
    """What a linear layer gives before its last sum, which is left to what reads it, a norm or rotary: y = round(sum of parts).

    parts: [num_parts, num_tokens, features], fp32, contiguous; they are added in their order
    dtype: the compute dtype, that of y
    """

    parts: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of y."""
        return self.parts.shape[1:]

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Some rows of y."""
        return self.parts[:, rows].sum(0).to(self.dtype)


@dataclass(frozen=True, slots=True)
class Added:
    """What a linear layer gives that has added its output to the residual stream. Whether the output is rounded before it is added depends
    on the product: cuBLAS may.

    total: [num_tokens, features], the compute dtype: the stream after it, which is all that the norm has to read
    """

    total: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.total.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.total.dtype


#: What stands between a linear layer and what comes next, [num_tokens, features]; a projection may have added it to the stream, too.
Unadded = torch.Tensor | SplitSums
Projected = Unadded | Added


def whole(x: Unadded) -> torch.Tensor:
    """x after its last sum, [num_tokens, features] in the compute dtype."""
    return x[:] if isinstance(x, SplitSums) else x


def parts_of(x: Unadded) -> tuple[torch.Tensor, int]:
    """(what a kernel reads of x that adds it up itself, number of parts): the tensor itself is one part."""
    if isinstance(x, torch.Tensor):
        return x, 1
    assert x.parts.is_contiguous(), "parts must be contiguous"
    return x.parts, x.parts.shape[0]


def stream_after(x: Projected, residual: torch.Tensor | None) -> torch.Tensor:
    """round(x + residual), [num_tokens, features]; x itself where there is no residual stream yet."""
    if isinstance(x, Added):
        return x.total
    return whole(x) if residual is None else whole(x) + residual


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """y = x W (+ b).

    weight: [in_features, out_features], the compute dtype; any strides
    bias:   [out_features], the compute dtype, or None
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def num_elements(self) -> int:
        return self.weight.numel()


@dataclass(frozen=True, slots=True)
class W4A16Weight:
    """y = x W (+ b) with W = (nibble - zero) * scale (AWQ, arXiv:2306.00978); scale, then each value are rounded to the compute dtype.

    qweight: [in_features / 2, out_features], uint8: rows 2i (low half) and 2i + 1 (high half), see `packing.pack_rows`
    scales:  [in_features / group_size, out_features], fp16      zeros: the same shape, uint8, 0..15
    bias:    [out_features], the compute dtype, or None
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def group_size(self) -> int:
        return 2 * self.qweight.shape[0] // self.scales.shape[0]

    @property
    def num_elements(self) -> int:
        return 2 * self.qweight.numel()


@dataclass(frozen=True, slots=True)
class W4A16Tiles:
    """The values of a W4A16Weight in the order of a matrix instruction's registers: `packing.pack_fragments`.

    words:  [out_features / 16, in_features / 64, 32, 4], int32: strips of 16 outputs, lanes, words
    params: [in_features / group_size, out_features], int32: bits of scale << 16 | bits of -(offset + zero), both of `dtype`
    bias:   [out_features], `dtype`, in natural order, or None
    dtype:  float16 or bfloat16, what the values are widened to
    gated:  columns are [gate | up]; words and params hold them as strips of 8 gates and the 8 ups of the same columns
    """

    words: torch.Tensor
    params: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    gated: bool = False

    @property
    def in_features(self) -> int:
        return 64 * self.words.shape[1]

    @property
    def out_features(self) -> int:
        return self.params.shape[1]

    @property
    def group_size(self) -> int:
        return self.in_features // self.params.shape[0]

    @property
    def num_elements(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class W8A8Weight:
    """int8 weights with a scale an output, int8 activations with a scale a token, made on the fly (arXiv:2211.10438).

        s_x = max(max |x|, 1e-7) / 127;  x8 = round_half_even(x / s_x) in [-127, 127];  y = (x8 W8, exact) * s_x * scale (+ b)

    in fp32, rounded once.   weight: [in_features, out_features], int8, any strides      scale: [out_features], fp32
    bias: [out_features], the compute dtype, or None
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def num_elements(self) -> int:
        return self.weight.numel()


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """As W8A8Weight in float8 e4m3 (arXiv:2209.05433): s_x = max(max |x|, 1e-7) / 448;  x8 = e4m3(x / s_x);  sums in fp32.

    weight: [in_features, out_features], float8_e4m3fn, any strides      scale: [out_features], fp32
    bias:   [out_features], the compute dtype, or None
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def num_elements(self) -> int:
        return self.weight.numel()


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations as W8A8Weight and Fp8Weight say, made once by what produced them: x = values * scale.

    values: [num_rows, in_features], int8 or float8_e4m3fn, contiguous; there may be more rows than num_rows, of no meaning
    scale:  [as many], fp32, contiguous      dtype: of the activations that these stand for, and of what a linear layer makes of them
    """

    values: torch.Tensor
    scale: torch.Tensor
    num_rows: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class QkvBeforeRotary:
    """What stands before attention of decodes that turns q and k itself, and stores k and v.

    qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim]
    """

    qkv: Unadded


#: A linear layer's weight; an op dispatches on the type.
LinearWeight = DenseWeight | W4A16Weight | W4A16Tiles | W8A8Weight | Fp8Weight


@dataclass(frozen=True, slots=True)
class QuantizedPages:
    """One layer's keys (or values), 8 or 4 bit with scales and zeros for each token and kv head, made when they are stored.

        x = key - offset (or the value)
        scale = (max - min) / (2^bits - 1) and zero = min over a part of head_dim, both rounded to the compute dtype
        q = round_half_even((x - zero) / scale) in [0, 2^bits - 1] (0 where scale is 0);     x' = q * scale + zero

    e4m3: scale = max |x| / 448, zero = 0, and q is the nearest float8 e4m3 number to x / scale, as its byte (bits 8, one part).

    A part is the whole head, or each of its halves: 4 bit keys need the finer one. Readers take x' for the key: softmax does not see a
    vector that is missing from every key.

    data:   [num_blocks, num_kv_heads, block_size, head_dim * bits / 8], uint8. 4 bit: byte j holds dim j in its low half and
            dim j + head_dim / 2 in its high half
    params: [num_blocks, num_kv_heads, block_size, 2 num_parts], the compute dtype: (scale, zero) of each part
    offset: [num_kv_heads, head_dim], fp32; None: 0
    """

    data: torch.Tensor
    params: torch.Tensor
    bits: int
    offset: torch.Tensor | None = None
    e4m3: bool = False

    @property
    def num_parts(self) -> int:
        return self.params.shape[3] // 2


@dataclass(frozen=True, slots=True)
class StaticInt8Pages:
    """One layer's keys (or values) in 8 bit with scales found at calibration, the same for all tokens.

        q = round_half_even((x - zero) / scale + 128) in [0, 255];     x' = (q - 128) * scale + zero

    data: [num_blocks, num_kv_heads, block_size, head_dim], uint8      scale, zero: [num_kv_heads], fp32
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


#: One layer's keys (or values). A plain tensor is [num_blocks, num_kv_heads, block_size, head_dim] in the compute dtype.
KvPages = torch.Tensor | QuantizedPages | StaticInt8Pages


@dataclass(frozen=True, slots=True)
class NormWeight:
    """RMSNorm's gain: [hidden], and the epsilon added to the mean square."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class QkvWeights:
    """What stands before attention in a layer.

    qkv columns: [q heads | k heads | v heads], each head's rotary dims half-split (Hugging Face's order)
    q_norm, k_norm: gains over head_dim, before rotary; both or neither
    """

    norm: NormWeight
    qkv: LinearWeight
    q_norm: NormWeight | None = None
    k_norm: NormWeight | None = None


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where each token of the step stands and where its keys and values lie.

    cos, sin:     [num_tokens, rotary_dim / 2], fp32 (attention factor included)
    q_scale:      [num_tokens], fp32: logn attention's factor; None when the model has none
    slot_mapping: [num_tokens], int64: block * block_size + offset of the token's key and value; -1 stores nothing
    block_tables: [num_rows, max_blocks], int32: blocks of each row in sequence order; past its context any valid block
    context_lens: [num_rows], int32: keys that the row's last token may see, itself included
    num_decodes:  rows [0, num_decodes) have one query token each
    max_decode_context: largest context_lens entry of those rows, 0 when there is none
    cu_seqlens_q: [num_rows - num_decodes + 1], int32: query tokens of the remaining rows before each of them, and of all
    prefills:     (num_query_tokens, context_len) of each remaining row; its queries are the last positions of its context
    is_captured:  decodes alone, made from device tensors for a CUDA graph of so many rows: what they launch is compiled when the graph is
    decode_rows, prefill_rows: (block_tables, context_lens) of the first num_decodes rows and of the remaining, which each layer asks for
    """

    cos: torch.Tensor
    sin: torch.Tensor
    q_scale: torch.Tensor | None
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    num_decodes: int
    max_decode_context: int
    cu_seqlens_q: torch.Tensor
    prefills: tuple[tuple[int, int], ...]
    is_captured: bool = False
    decode_rows: tuple[torch.Tensor, torch.Tensor] = field(init=False, repr=False, compare=False)
    prefill_rows: tuple[torch.Tensor, torch.Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n = self.num_decodes
        object.__setattr__(self, "decode_rows", (self.block_tables[:n], self.context_lens[:n]))
        object.__setattr__(self, "prefill_rows", (self.block_tables[n:], self.context_lens[n:]))


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of the rows whose logits are drawn from: [num_rows], fp64, contiguous, unless said. A group that no row
    needs is None as a whole.

    banned_ids: [num_banned], int64: ids that may not be drawn now, row i's at [banned_starts[i], banned_starts[i + 1])
    bias_ids, bias: [num_biased], int64 and fp64, in the same way by bias_starts: added to these logits first; a row's ids differ
    banned_starts, bias_starts: [num_rows + 1], int64; a row may have none
    temperature: 1 where the request says 0 (greedy)
    repetition_penalty, presence_penalty, frequency_penalty: 1, 0, 0 where the row has none
    slots: int64, each row's line in output_counts and seen
    output_counts: [num_slots, vocab_size], int32: times each token was produced      seen: the same shape, bool: in prompt or output
    top_k: int64, in [1, vocab_size] (off: vocab_size); 1 makes a row greedy      top_p: in (0, 1]      min_p: in [0, 1]
    uniform: in [0, 1): from (seed, position, sample index), see model/sampler.py
    max_top_k: largest top_k, 1 when all rows are greedy
    """

    banned_ids: torch.Tensor | None = None
    banned_starts: torch.Tensor | None = None
    bias_ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bias_starts: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    repetition_penalty: torch.Tensor | None = None
    presence_penalty: torch.Tensor | None = None
    frequency_penalty: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    output_counts: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    max_top_k: int = 1
    has_top_k: bool = False  # some row has 1 < top_k < vocab_size
    has_top_p: bool = False  # some row without top_k has top_p < 1

    @property
    def is_plain_greedy(self) -> bool:
        """Every row takes its first largest logit that is not banned; temperatures do not change which that is."""
        return self.top_k is None and self.output_counts is None and self.bias_ids is None
