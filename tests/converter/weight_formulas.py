"""Where in the checkpoint the value at [row, column] of a rank's file comes from, and files compared with that, bit by bit.

The formulas are written element by element from the format's description and share no code with the converter.
`quantise` makes linears of 4 bits whose values are known.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from tests.converter.conftest import Workspace, bits


class Shape(NamedTuple):
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int
    vocab: int
    tp: int


def rotary_source(column: int, head_dim: int) -> int:
    """Row of the checkpoint's q (or k) that column `column` of the interleaved projection holds."""
    head, within = divmod(column, head_dim)
    i, s = divmod(within, 2)
    return head * head_dim + s * (head_dim // 2) + i


def qkv_source(column: int, rank: int, s: Shape, *, rotary: bool = True) -> tuple[str, int]:
    """(projection, its row) behind column `column` of rank `rank`'s w_qkv."""
    q_share, kv_share = s.heads * s.head_dim // s.tp, s.kv_heads * s.head_dim // s.tp
    if column < q_share:
        whole = rank * q_share + column
        return "q", rotary_source(whole, s.head_dim) if rotary else whole
    if column < q_share + kv_share:
        whole = rank * kv_share + column - q_share
        return "k", rotary_source(whole, s.head_dim) if rotary else whole
    return "v", rank * kv_share + column - q_share - kv_share


def separate(p: str, kind: str = "weight") -> Callable[[str, int, Shape], tuple[str, int]]:
    return lambda part, row, s: (f"{p}.self_attn.{part}_proj.{kind}", row)


def stacked(name: str) -> Callable[[str, int, Shape], tuple[str, int]]:
    return lambda part, row, s: (name, "qkv".index(part) * s.heads * s.head_dim + row)


def grouped(name: str) -> Callable[[str, int, Shape], tuple[str, int]]:
    def find(part: str, row: int, s: Shape) -> tuple[str, int]:
        head, d = divmod(row, s.head_dim)
        per_kv = s.heads // s.kv_heads
        slot = (head // per_kv) * (per_kv + 2) + head % per_kv
        if part != "q":
            slot = head * (per_kv + 2) + per_kv + (part == "v")
        return name, slot * s.head_dim + d

    return find


def check_qkv(
    ws: Workspace, layer: int, tensors: dict[str, torch.Tensor], s: Shape, find: Any, dtype: torch.dtype, **kw: Any
) -> None:
    columns = (s.heads + 2 * s.kv_heads) * s.head_dim // s.tp
    kind = kw.pop("kind", "weight")
    for rank in range(s.tp):
        shape = (s.hidden, columns) if kind == "weight" else (columns,)
        found = ws.bits(f"layers.{layer}.attention.w_qkv.{rank}.{kind}", shape)
        for column in range(columns):
            name, row = find(*qkv_source(column, rank, s, **kw), s)
            expected = bits(tensors[name][row].to(dtype))
            np.testing.assert_array_equal(found[..., column], expected, err_msg=f"rank {rank} column {column}")


def check_rows(ws: Workspace, file: str, source: torch.Tensor, tp: int, dtype: torch.dtype) -> None:
    """source [out, in] is stored as its transpose, shared out by rows (= the source's columns)."""
    share = source.shape[1] // tp
    for rank in range(tp):
        found = ws.bits(file.format(rank), (share, source.shape[0]))
        for row in range(share):
            np.testing.assert_array_equal(found[row], bits(source[:, rank * share + row].to(dtype)))


def check_columns(ws: Workspace, file: str, source: torch.Tensor, tp: int, dtype: torch.dtype) -> None:
    share = source.shape[0] // tp
    for rank in range(tp):
        found = ws.bits(file.format(rank), (source.shape[1], share))
        for column in range(share):
            np.testing.assert_array_equal(found[:, column], bits(source[rank * share + column].to(dtype)))


def check_whole(ws: Workspace, file: str, source: torch.Tensor, dtype: torch.dtype, rows: int | None = None) -> None:
    found = ws.bits(file, (rows or source.shape[0], *source.shape[1:]))
    np.testing.assert_array_equal(found[: source.shape[0]], bits(source.to(dtype)))
    assert not found[source.shape[0] :].any()


def check_feed_forward(
    ws: Workspace, layer: int, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, tp: int, dtype: Any
) -> None:
    check_columns(ws, f"layers.{layer}.feed_forward.w1.{{}}.weight", w1, tp, dtype)
    check_columns(ws, f"layers.{layer}.feed_forward.w3.{{}}.weight", w3, tp, dtype)
    check_rows(ws, f"layers.{layer}.feed_forward.w2.{{}}.weight", w2, tp, dtype)


def check_llama_like(
    ws: Workspace, tensors: dict[str, torch.Tensor], s: Shape, layers: int, dtype: torch.dtype, *, bias: bool
) -> None:
    padded = -(-s.vocab // s.tp) * s.tp
    check_whole(ws, "tok_embeddings.weight", tensors["model.embed_tokens.weight"], dtype, padded)
    check_whole(ws, "norm.weight", tensors["model.norm.weight"], dtype)
    if "lm_head.weight" in tensors:
        check_whole(ws, "output.weight", tensors["lm_head.weight"], dtype, padded)
    for i in range(layers):
        p = f"model.layers.{i}"
        check_whole(ws, f"layers.{i}.attention_norm.weight", tensors[f"{p}.input_layernorm.weight"], dtype)
        check_whole(ws, f"layers.{i}.ffn_norm.weight", tensors[f"{p}.post_attention_layernorm.weight"], dtype)
        check_qkv(ws, i, tensors, s, separate(p), dtype)
        check_rows(ws, f"layers.{i}.attention.wo.{{}}.weight", tensors[f"{p}.self_attn.o_proj.weight"], s.tp, dtype)
        if bias:
            check_qkv(ws, i, tensors, s, separate(p, "bias"), dtype, kind="bias")
            o_bias = tensors.get(f"{p}.self_attn.o_proj.bias", torch.zeros(s.hidden))
            for rank in range(s.tp):
                check_whole(ws, f"layers.{i}.attention.wo.{rank}.bias", o_bias, dtype)
        mlp = [tensors[f"{p}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")]
        check_feed_forward(ws, i, *mlp, s.tp, dtype)


def quantise(shape: tuple[int, int], seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray, torch.Tensor]:
    """AutoAWQ's three tensors of one linear [k, m], and the natural nibbles, zeros and scales behind them."""
    k, m = shape
    rng = np.random.default_rng(seed)
    q, z = rng.integers(0, 16, (k, m)), rng.integers(0, 16, (k // 128, m))
    scales = torch.from_numpy(rng.random((k // 128, m), dtype=np.float32) * 0.01 + 0.001)

    def pack(values: np.ndarray) -> torch.Tensor:
        words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
        for column in range(values.shape[1]):
            nibble = [0, 2, 4, 6, 1, 3, 5, 7].index(column % 8)
            words[:, column // 8] |= values[:, column].astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(words.view(np.int32))

    return {"qweight": pack(q), "qzeros": pack(z), "scales": scales}, q, z, scales


def check_int4(ws: Workspace, linear: str, rank: int, q: np.ndarray, z: np.ndarray, scales: torch.Tensor) -> None:
    """q, z, scales: this rank's natural columns, in the order that the file has them."""
    k, m = q.shape
    words = ws.bits(f"{linear}.{rank}.qweight", (k // 32, m // 32, 32, 4), np.uint32)
    kk, mm = np.meshgrid(np.arange(k), np.arange(m), indexing="ij")
    lane = (mm % 8) * 4 + (kk % 8) // 2
    word = ((kk % 32) // 16) * 2 + (mm % 32) // 16
    nibble = (kk % 2) * 4 + ((kk % 16) // 8) * 2 + (mm % 16) // 8
    np.testing.assert_array_equal((words[kk // 32, mm // 32, lane, word] >> (4 * nibble)) & 0xF, q)
    packed = ws.bits(f"{linear}.{rank}.scales_zeros", (k // 128, m), np.uint32)
    low = (64 + torch.from_numpy(z).half()).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(packed & 0xFFFF, low)
    np.testing.assert_array_equal(packed >> 16, bits(scales.half()))
