"""The directory that a conversion makes: all of it, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from t5x_like.errors import UserError

# What belongs to a model besides its weights, in a directory of any kind.
_CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "chat_template.json", "chat_template.jinja", "generation_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)


def check_new(path: str | Path) -> Path:
    """The absolute path of a directory that can be made.

    Raises:
      UserError: `path` is on an object store, is a file or is a directory with something in it.
    """
    if "://" in str(path):
        raise UserError(f"'{path}' is no local directory: convert to one, then copy it.")
    target = Path(path).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"The destination '{path}' exists and is not empty: give another or remove it first."
        )
    return target


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory beside `path` to write to; it becomes `path` if the block ends without error."""
    target = check_new(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.tmp-") as temporary:
        content = Path(temporary) / "content"
        content.mkdir()
        yield content
        os.replace(content, target)  # Over an empty directory, too.


def carry_files(source: Path, target: Path) -> list[str]:
    """Copies tokenizer and licence files that are there; returns their names."""
    names = [name for name in _CARRIED if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
