"""The `postprocessing` door: token ids to text, LMDeploy's contract. `sequence_length` is where the wanted text begins."""

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from turbotriton.contract.errors import InvalidInputError
from turbotriton.text.detokenizer import TextTokenizer

from .door import UnaryDoor
from .inputs import check_parameters, read_array, read_int

__all__ = ["TritonPythonModel"]

UINT32 = 2**32 - 1


class TritonPythonModel(UnaryDoor):
    def open(self, folder: Path, args: dict[str, str], server_pid: int) -> None:
        self._tokenizer = TextTokenizer.load(folder / "tokenizer")

    def answer(self, request: Any) -> Any:
        check_parameters(request)
        ids = read_array(request, "TOKENS_BATCH")
        offset, skip = read_int(request, "sequence_length", 0, UINT32), read_int(request, "skip_special_tokens", 0, 1)
        if ids is None or offset is None:
            raise InvalidInputError("TOKENS_BATCH and sequence_length are required")
        if offset > ids.size:
            raise InvalidInputError(f"sequence_length is {offset} and TOKENS_BATCH has {ids.size} ids")
        text = self._decode(ids.tolist(), offset, skip != 0)
        output = np.array([text.encode()], dtype=np.object_)  # [1] and not [1, 1]: what LMDeploy's client can read
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("OUTPUT", output)])

    def _decode(self, ids: list[int], offset: int, skip_special_tokens: bool) -> str:
        """ids[offset:] as text; a token before it is decoded along, so that a leading space of the piece is kept."""
        if not offset:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        before = self._tokenizer.decode(ids[offset - 1 : offset], skip_special_tokens=skip_special_tokens)
        both = self._tokenizer.decode(ids[offset - 1 :], skip_special_tokens=skip_special_tokens)
        if both.startswith(before):
            return both[len(before) :]
        return self._tokenizer.decode(ids[offset:], skip_special_tokens=skip_special_tokens)
