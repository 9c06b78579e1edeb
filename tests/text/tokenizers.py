"""Released tokenizers as a workspace has them."""

import functools
import shutil
import tempfile
from pathlib import Path

from turbotriton.converter.tokenizer.folder import write_tokenizer
from turbotriton.text.detokenizer import TextTokenizer


@functools.cache
def released_tokenizer(folder: Path, config: str | None) -> TextTokenizer:
    """`config`: the file that is this release's tokenizer_config.json, where several share a vocabulary."""
    scratch = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    source = Path(shutil.copytree(folder, scratch / "source"))
    if config is not None:
        shutil.copyfile(source / config, source / "tokenizer_config.json")
    target = scratch / "tokenizer"
    write_tokenizer(source, None, target, copy_code=False)
    return TextTokenizer.load(target)
