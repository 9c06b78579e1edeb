"""What fits on a GPU and how fast it will be: arithmetic on shapes, before anything is loaded.

    memory:    weights + reserve + KV blocks = the GPU's memory
    limit:     a step takes the sum over its operations of max(bytes / bandwidth, operations / rate); the embedding table is not read
    expected:  the same with the shares of bandwidth and rate that our engine reached, and what a layer costs besides

The limit is the roofline: nothing can be faster. `GPUS` holds the rates that operations really reach where they were measured (H200),
and the data sheet's times the H200's share of its own data sheet elsewhere. The shares of `expected` are those of 16 bit on an H200
(docs/perf-log.md, 2026-11-23, one row 2026-11-29).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from turbotriton.contract.errors import InvalidInputError

__all__ = [
    "GPUS",
    "KV_BITS",
    "WEIGHT_BITS",
    "Gpu",
    "ModelShape",
    "Plan",
    "decode_step_s",
    "expected_decode_step_s",
    "expected_prefill_s",
    "mean_context",
    "plan",
    "prefill_s",
]

GIB = 2**30
#: Bits a weight of a linear takes with its scales: groups of 128 with an fp16 scale and zero for awq.
WEIGHT_BITS: Mapping[str, float] = {"none": 16, "awq": 4 + 32 / 128, "w8a8": 8, "fp8": 8}
#: quant_policy -> bits a key or value takes, and bytes of a key's and its value's scales and zeros: an fp16 pair of each token and head,
#: two of 4 bit keys.
KV_BITS: Mapping[int, int] = {0: 16, 8: 8, 16: 8, 4: 4}
KV_SCALE_BYTES: Mapping[int, int] = {0: 0, 8: 8, 16: 8, 4: 12}
#: Device memory that is neither weights nor KV: context, activations of a prefill chunk, graphs.
RESERVE_BYTES = 2 * GIB
#: Products of at most so many rows reach this share of the rate of large ones (596 of 670 TFLOP/s at 256 rows on an H200).
LARGE_ROWS, SMALL_SHARE = 512, 596 / 670
#: What the engine reached in decode steps: of bandwidth and of the rate of small products, and seconds a layer took besides.
DECODE_SHARE, DECODE_LAYER_S = 0.9, 19e-6
#: The same of one row over 16 bit weights, whose layers begin before the layer before them ends.
ROW_SHARE, ROW_LAYER_S = 0.98, 13e-6
#: And in prefill: attention's share of the rate; norms, rotary and activation move bytes at DECODE_SHARE of the bandwidth.
PREFILL_ATTENTION_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory in bytes; bandwidth in bytes/s; rates in operations/s of large 16 bit and 8 bit products."""

    title: str
    memory: float
    bandwidth: float
    rate_16: float
    rate_8: float
    is_measured: bool = False


def _from_data_sheet(title: str, memory_gib: float, tb_per_s: float, tflops_16: float, tflops_8: float) -> Gpu:
    """The data sheet's figures times what an H200 reaches of its own: 4.62 of 4.8 TB/s, 670 of 989 TFLOP/s."""
    reached = 670 / 989
    return Gpu(title, memory_gib * GIB, tb_per_s * 1e12 * 4.62 / 4.8, tflops_16 * 1e12 * reached, tflops_8 * 1e12 * reached)


GPUS: Mapping[str, Gpu] = {
    "h200": Gpu("NVIDIA H200", 139.8 * GIB, 4.62e12, 670e12, 1340e12, is_measured=True),
    "b200": _from_data_sheet("NVIDIA B200", 178, 8.0, 2250, 4500),
    "h100": _from_data_sheet("NVIDIA H100 80GB HBM3", 79.6, 3.35, 989, 1979),
    "h20": _from_data_sheet("NVIDIA H20", 95.6, 4.0, 148, 296),
    "a100": _from_data_sheet("NVIDIA A100 80GB", 79.3, 2.04, 312, 624),
    "a100-40": _from_data_sheet("NVIDIA A100 40GB", 39.4, 1.555, 312, 624),
    "l40s": _from_data_sheet("NVIDIA L40S", 44.5, 0.864, 362, 733),
    "l4": _from_data_sheet("NVIDIA L4", 22.5, 0.30, 121, 242),
    "a10": _from_data_sheet("NVIDIA A10", 22.5, 0.60, 125, 250),
    "rtx5090": _from_data_sheet("NVIDIA GeForce RTX 5090", 31.4, 1.792, 209, 419),
    "rtx4090": _from_data_sheet("NVIDIA GeForce RTX 4090", 23.6, 1.008, 165, 330),
    "rtx3090": _from_data_sheet("NVIDIA GeForce RTX 3090", 23.6, 0.936, 71, 142),
}


class Sized(Protocol):
    """A model's configuration: ours, or a checkpoint's."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def inter_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide memory and work; session_len: longest sequence in tokens."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inter_size: int
    vocab_size: int
    tie_word_embeddings: bool
    session_len: int

    @classmethod
    def of(cls, config: Sized, session_len: int) -> Self:
        return cls(
            config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.inter_size,
            config.vocab_size, config.tie_word_embeddings, session_len,
        )  # fmt: skip

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's products: qkv, output, gate and up, down."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            (self.hidden_size, q_size + 2 * kv_size),
            (q_size, self.hidden_size),
            (self.hidden_size, 2 * self.inter_size),
            (self.inter_size, self.hidden_size),
        )

    @property
    def linear_elements(self) -> int:
        return self.num_layers * sum(rows * columns for rows, columns in self.linears)

    @property
    def table_elements(self) -> int:
        """Embedding and head, always in 16 bit."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def weight_bytes(self, quant: str) -> float:
        return self.linear_elements * WEIGHT_BITS[quant] / 8 + 2 * self.table_elements

    def kv_bytes_a_token(self, quant_policy: int) -> float:
        a_head = 2 * self.head_dim * KV_BITS[quant_policy] / 8 + KV_SCALE_BYTES[quant_policy]
        return self.num_layers * self.num_kv_heads * a_head


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits on `tp` GPUs together. Bytes are of one GPU."""

    weight_bytes: float
    kv_bytes: float
    kv_tokens: int
    num_sessions: int  # of session_len tokens each, at once


def plan(model: ModelShape, gpu: Gpu, *, tp: int, quant: str, quant_policy: int, cache_share: float) -> Plan:
    """cache_share: of the memory that the weights leave, as cache_max_entry_count. Raises InvalidInputError when it does not fit."""
    if model.num_kv_heads % tp or model.num_heads % tp:
        raise InvalidInputError(
            f"--tp is {tp}; it must divide the {model.num_heads} heads and {model.num_kv_heads} key/value heads"
        )
    weights = model.weight_bytes(quant) / tp
    kv_bytes = max(0.0, gpu.memory - weights - RESERVE_BYTES) * cache_share
    kv_tokens = int(kv_bytes / (model.kv_bytes_a_token(quant_policy) / tp))
    if kv_tokens < model.session_len:
        raise InvalidInputError(
            f"{weights / GIB:.1f} GiB of weights leave room for {kv_tokens} tokens of KV cache on {gpu.title} "
            f"with {gpu.memory / GIB:.0f} GiB, fewer than session_len {model.session_len}; try {_remedy(quant, quant_policy, tp)}"
        )
    return Plan(weights, kv_bytes, kv_tokens, kv_tokens // model.session_len)


def _remedy(quant: str, quant_policy: int, tp: int) -> str:
    remedies = ["--quant awq"] * (quant == "none") + ["--quant-policy 8"] * (quant_policy == 0)
    return ", ".join([*remedies, f"--tp {2 * tp}", "a shorter --session-len"])


def decode_step_s(
    model: ModelShape, gpu: Gpu, batch: int, context_len: float, *, tp: int, quant: str, quant_policy: int
) -> float:
    """Least seconds of one step that adds a token to each of `batch` sequences of `context_len` tokens."""
    attention_bytes = batch * context_len * model.kv_bytes_a_token(quant_policy) / model.num_layers
    attention_ops = 4.0 * batch * context_len * model.num_heads * model.head_dim
    layer = sum(_product_s(gpu, batch, *sizes, quant) for sizes in model.linears)
    layer += max(attention_bytes / gpu.bandwidth, attention_ops / gpu.rate_16)
    return (model.num_layers * layer + _product_s(gpu, batch, model.hidden_size, model.vocab_size, "none")) / tp


def prefill_s(model: ModelShape, gpu: Gpu, prompt_len: int, *, tp: int, quant: str) -> float:
    """Least seconds to compute one prompt of `prompt_len` tokens and its first token."""
    attention_ops = 2.0 * prompt_len * prompt_len * model.num_heads * model.head_dim  # half of the square is masked
    layer = sum(_product_s(gpu, prompt_len, *sizes, quant) for sizes in model.linears) + attention_ops / gpu.rate_16
    return (model.num_layers * layer + _product_s(gpu, 1, model.hidden_size, model.vocab_size, "none")) / tp


def expected_decode_step_s(
    model: ModelShape, gpu: Gpu, batch: int, context_len: float, *, tp: int, quant: str, quant_policy: int
) -> float:
    """Seconds that our engine takes for such a step."""
    limit = decode_step_s(model, gpu, batch, context_len, tp=tp, quant=quant, quant_policy=quant_policy)
    share, layer_s = (ROW_SHARE, ROW_LAYER_S) if batch == 1 and quant == "none" else (DECODE_SHARE, DECODE_LAYER_S)
    return limit / share + model.num_layers * layer_s


def expected_prefill_s(model: ModelShape, gpu: Gpu, prompt_len: int, *, tp: int, quant: str) -> float:
    """Seconds that our engine takes for such a prompt."""
    attention_s = 2.0 * prompt_len * prompt_len * model.num_heads * model.head_dim / gpu.rate_16
    qkv_columns = model.linears[0][1]
    moved = 2.0 * prompt_len * (8 * model.hidden_size + 3 * model.inter_size + 2 * qkv_columns)
    besides = attention_s * (1 / PREFILL_ATTENTION_SHARE - 1) + moved / (DECODE_SHARE * gpu.bandwidth)
    return prefill_s(model, gpu, prompt_len, tp=tp, quant=quant) + model.num_layers * besides / tp


def _product_s(gpu: Gpu, rows: int, inputs: int, outputs: int, quant: str) -> float:
    """Least seconds of [rows, inputs] x [inputs, outputs]; awq multiplies in 16 bit, w8a8 and fp8 in 8."""
    moved = inputs * outputs * WEIGHT_BITS[quant] / 8 + 2 * rows * (inputs + outputs)
    rate = (gpu.rate_8 if quant in ("w8a8", "fp8") else gpu.rate_16) * (1.0 if rows > LARGE_ROWS else SMALL_SHARE)
    return max(moved / gpu.bandwidth, 2.0 * rows * inputs * outputs / rate)


def mean_context(prompt_len: int, output_len: int) -> float:
    """Tokens that a decode step attends to, on average over an answer."""
    return prompt_len + math.ceil(output_len / 2)
