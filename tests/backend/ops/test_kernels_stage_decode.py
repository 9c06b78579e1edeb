"""The kernels of stage_decode.py against the reference: gathered integers equal, angles' cos and sin to fp32's last bits."""

import pytest
import torch

from turbotriton.backend.ops.kernels.stage_decode import advance_decode, stage_decode
from turbotriton.backend.ops.reference.stage_decode import advance_decode as reference_advance
from turbotriton.backend.ops.reference.stage_decode import stage_decode as reference

TOLERANCE = 3e-6  # libraries' cos of angles up to 2^13 differ in last bits


@pytest.mark.parametrize(("num_slots", "session_len", "block_size", "half"), [(3, 20, 4, 8), (5, 700, 64, 33), (2, 8192, 16, 64)])
@pytest.mark.parametrize("rope_factor", [1.0, 1.25])
def test_rows_gather_their_slots(target, num_slots, session_len, block_size, half, rope_factor):
    make = target.generator
    max_blocks = -(-session_len // block_size)
    ids = torch.randint(0, 1000, (num_slots, session_len + 1), generator=make, dtype=torch.int32).to(target.device)
    tables = torch.randint(0, 5000, (num_slots, max_blocks), generator=make, dtype=torch.int32).to(target.device)
    inverse = (1.0 / 10000.0 ** (torch.arange(half) / half)).repeat(num_slots, 1).to(target.device)
    slots = torch.tensor([num_slots - 1, 0, 0, 0, 1]).to(target.device)
    positions = torch.tensor([session_len - 1, 0, -1, 1, session_len // 2]).to(target.device)
    found = stage_decode(slots, positions, ids, tables, inverse, rope_factor, block_size)
    wanted = reference(slots, positions, ids, tables, inverse, rope_factor, block_size)
    is_row = positions >= 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if ours.is_floating_point():
            assert (ours - theirs).abs().max() <= TOLERANCE
        else:
            assert torch.equal(ours[is_row], theirs[is_row])
    assert found[3].tolist()[2] == wanted[3].tolist()[2] == -1
    assert found[5].tolist()[2] == wanted[5].tolist()[2] == 0


@pytest.mark.parametrize(("num_padded", "num_rows"), [(1, 1), (5, 0), (16, 11), (48, 33), (64, 64)])
def test_rows_go_on_and_padding_does_not(target, num_padded, num_rows):
    make = target.generator
    ids = torch.randint(0, 1000, (num_padded, 21), generator=make, dtype=torch.int32).to(target.device)
    inputs = torch.stack((torch.randperm(num_padded, generator=make), torch.randint(0, 20, (num_padded,), generator=make)))
    inputs[1, num_rows:] = -1
    drawn = torch.randint(1000, 2000, (num_rows,), generator=make).to(target.device)
    ours, theirs = (inputs.clone().to(target.device) for _ in range(2))
    our_ids, their_ids = ids.clone(), ids.clone()
    advance_decode(*ours.unbind(), our_ids, drawn)
    reference_advance(*theirs.unbind(), their_ids, drawn)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_ids, their_ids)
    assert int((our_ids >= 1000).sum()) == num_rows
