"""What the tests of guided answers share: the demo model's tokenizer, how its tokens are read, how long a grammar may take."""

from tokenizers import Tokenizer

from turbotriton.demo import checkpoint_path

#: Seconds until what has to happen counts as missing: only a test that fails waits for so long.
PATIENCE_S = 60.0
TOKENIZER_JSON = checkpoint_path() / "tokenizer.json"
TOKENIZER = Tokenizer.from_file(str(TOKENIZER_JSON))
EOS = TOKENIZER.token_to_id("<|im_end|>")


def read(token_ids: list[int]) -> str:
    return str(TOKENIZER.decode([token for token in token_ids if token != EOS], skip_special_tokens=False))
