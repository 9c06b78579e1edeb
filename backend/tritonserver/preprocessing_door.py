"""The `preprocessing` door: text to token ids, LMDeploy's contract. `<BOS>` and `<EOS>` ask for those ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from turbotriton.contract.errors import InvalidInputError, TurbotritonError
from turbotriton.text.detokenizer import TextTokenizer

from .door import Door
from .errors import error_response
from .inputs import check_parameters, read_strings

__all__ = ["TritonPythonModel"]

NO_TOKEN = 2**32 - 1  # what LMDeploy answers for a special token that the tokenizer lacks


class TritonPythonModel(Door):
    def open(self, folder: Path, args: dict[str, str], server_pid: int) -> None:
        self._tokenizer = TextTokenizer.load(folder / "tokenizer")
        eos = self._tokenizer.eos_token_id
        self._pad = 0 if eos is None else eos
        bos = self._tokenizer.bos_token_id
        self._special = {"<BOS>": NO_TOKEN if bos is None else bos, "<EOS>": NO_TOKEN if eos is None else eos}

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
        texts = read_strings(request, "QUERY")
        if not texts:
            raise InvalidInputError("QUERY is empty; send one text")
        rows = [self._encode(text) for text in texts]
        longest = max(map(len, rows))
        padded = np.array([row + [self._pad] * (longest - len(row)) for row in rows], dtype=np.uint32)
        lengths = np.array([[len(row)] for row in rows], dtype=np.uint32)
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor("INPUT_ID", padded), pb_utils.Tensor("REQUEST_INPUT_LEN", lengths)]
        )

    def _encode(self, text: str) -> list[int]:
        """At least one id, also for the empty text: LMDeploy's client fails on an empty row when it ends or cancels."""
        if text in self._special:
            return [self._special[text]]
        return self._tokenizer.encode(text) or [self._pad]
