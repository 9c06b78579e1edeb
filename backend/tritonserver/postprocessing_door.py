"""The `postprocessing` door: token ids to text, LMDeploy's contract. `sequence_length` is where the wanted text begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from turbotriton.contract.errors import InvalidInputError, TurbotritonError
from turbotriton.text.detokenizer import TextTokenizer

from .door import Door
from .errors import error_response
from .inputs import check_parameters, read_array

__all__ = ["TritonPythonModel"]


class TritonPythonModel(Door):
    def open(self, folder: Path, args: dict[str, str], server_pid: int) -> None:
        self._tokenizer = TextTokenizer.load(folder / "tokenizer")

    def serve(self, requests: Sequence[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                responses.append(self._answer(request))
            except TurbotritonError as error:
                responses.append(error_response(error))
        return responses

    def _answer(self, request: Any) -> Any:
        check_parameters(request)
        ids = read_array(request, "TOKENS_BATCH")
        offset, skip = read_array(request, "sequence_length"), read_array(request, "skip_special_tokens")
        if ids is None or offset is None or offset.size != 1:
            raise InvalidInputError("TOKENS_BATCH and one sequence_length are required")
        if int(offset[0]) > ids.size:
            raise InvalidInputError(f"sequence_length is {int(offset[0])} and TOKENS_BATCH has {ids.size} ids")
        text = self._decode(ids.tolist(), int(offset[0]), skip is None or not skip.size or bool(skip[0]))
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
