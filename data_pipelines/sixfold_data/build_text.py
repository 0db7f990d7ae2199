"""Building a text data set: every file a document, tokenised once, so that training reads token numbers by offset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sixfold.errors import DataError
from sixfold_data.build import (
    TRAIN,
    VAL,
    BuildOptions,
    BuildReport,
    KeyMaker,
    Rejects,
    assign_splits,
    building,
    check_output,
    files_below,
)
from sixfold_data.json_tokenizer import TOKENIZER_NAME, JsonTokenizer
from sixfold_data.tokenizers import STORAGE_DTYPES, ByteTokenizer, CharacterTokenizer, Tokenizer, storage_extension

ENCODE_CHARACTERS = 1 << 20  # token numbers are int64 while they are made; a piece bounds what that costs
_SHARE_UNTOLD = 1e-3  # SentencePiece's tokenizers begin a document with a blank of their own


@dataclass(frozen=True)
class Document:
    """One text: a name (relative path), its split, and how to read it."""

    name: str
    split: str
    read: Callable[[], str]


def build_text(
    source: Path, options: BuildOptions, tokenizer: str = "bytes", *, end_of_text: str | None = None
) -> BuildReport:
    """Build a text data set from a file or a folder.

    A folder gives one document a file, split by the hash of the file's name. A single file gives two documents: its
    last ``val_fraction`` characters are ``val``, the usual split of character-level language models.

    Args:
        source: a UTF-8 text file, or a folder of them (other files are counted as unreadable).
        options: see :class:`BuildOptions`.
        tokenizer: ``bytes``, ``characters`` (those of all documents make the vocabulary), or the path of a
            ``tokenizer.json`` or of the folder that holds it.
        end_of_text: the token of a ``tokenizer.json`` that ends a document; None looks for a known one.

    Raises:
        DataError: there is no text, too many files are unreadable, or the output is not empty.
    """
    if source.is_dir():
        files = files_below(source)
        names = [file.relative_to(source).as_posix() for file in files]
        splits = assign_splits(names, options.val_fraction)
        documents = [
            Document(name, split, _reader(file)) for name, split, file in zip(names, splits, files, strict=True)
        ]
    else:
        documents = _halves(source, options.val_fraction)
    if not documents:
        raise DataError.of(
            "there is no file in this folder" if source.is_dir() else "the file is empty",
            where=str(source),
            fix="name a text file, or a folder with text files",
        )
    return build_documents(documents, options, tokenizer, end_of_text=end_of_text)


def build_documents(
    documents: Sequence[Document], options: BuildOptions, tokenizer: str, *, end_of_text: str | None = None
) -> BuildReport:
    """Build a text data set from documents in the order given."""
    check_output(options.out)
    made = _make_tokenizer(tokenizer, documents, end_of_text)
    extension = storage_extension(made.vocabulary_size)
    with building(options) as work:
        keys = KeyMaker()
        remarks = []
        text_bytes = encoded_bytes = 0
        if isinstance(made, JsonTokenizer):
            work.write_file(TOKENIZER_NAME, made.content)
        for number, document in enumerate(documents):
            text = _read(document, work.rejects)
            if text == "":
                remarks.append(f"{document.name}: the file is empty and makes no document")
            elif text is not None:
                stored, tokens = _encode(made, text, extension)
                text_bytes += len(text.encode())
                encoded_bytes += int(made.token_bytes[np.frombuffer(stored, dtype=STORAGE_DTYPES[extension])].sum())
                work.writers[document.split].add(keys.key(document.name), {extension: stored}, tokens=tokens)
            options.progress(number + 1, len(documents))
        if abs(encoded_bytes - text_bytes) > _SHARE_UNTOLD * text_bytes:
            remarks.append(
                f"the tokens stand for {encoded_bytes} bytes of {text_bytes}: the tokenizer changes or loses text, and "
                "bits per byte are those of what it makes of it"
            )
        return work.finish("text", tokenizer=made.description(), remarks=remarks)


def decode_text(data: bytes) -> str:
    """Return strictly decoded UTF-8 text; line ends are kept as they are.

    Raises:
        ValueError: it is no text; says at which byte.
    """
    if b"\0" in data:
        raise ValueError(f"a zero byte at {data.index(0)}: this is not text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} ({error.reason})") from error


def _reader(file: Path) -> Callable[[], str]:
    return lambda: decode_text(file.read_bytes())


def _read(document: Document, rejects: Rejects) -> str | None:
    """Return the document's text; None if it cannot be read, which is noted."""
    try:
        return document.read()
    except (OSError, ValueError) as error:
        rejects.add(document.name, str(error))
        return None


def _halves(file: Path, val_fraction: float) -> list[Document]:
    """Cut one file into train and val at a character."""
    try:
        text = decode_text(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError.of(
            f"the input cannot be read: {error}", where=str(file), fix="name a UTF-8 text file or a folder of them"
        ) from error
    cut = int(len(text) * (1.0 - val_fraction))
    parts = {TRAIN: text[:cut], VAL: text[cut:]}
    return [
        Document(f"{file.stem}-{split}.txt", split, lambda part=part: part)  # type: ignore[misc]  # bound at definition
        for split, part in parts.items()
        if part
    ]


def _make_tokenizer(name: str, documents: Sequence[Document], end_of_text: str | None) -> Tokenizer:
    if name not in ("bytes", "characters"):
        return JsonTokenizer.of_file(Path(name).expanduser(), end_of_text)
    if end_of_text is not None:
        raise DataError.of(
            f"the tokenizer {name} has an end of text of its own", where="--end-of-text", fix="leave it out"
        )
    return ByteTokenizer() if name == "bytes" else CharacterTokenizer.of_corpus(_readable_texts(documents))


def _readable_texts(documents: Sequence[Document]) -> Iterator[str]:
    for document in documents:
        try:
            yield document.read()
        except (OSError, ValueError):  # named and counted when the document is to be written
            continue


def _pieces(text: str) -> Iterator[str]:
    """Cut a text before blanks where there are any, since tokens rarely reach over them."""
    start = 0
    while start < len(text):
        end = start + ENCODE_CHARACTERS
        if end < len(text):
            blank = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
            end = blank if blank > start else end
        yield text[start:end]
        start = end


def _encode(tokenizer: Tokenizer, text: str, extension: str) -> tuple[bytes, int]:
    """Return the stored token numbers, end of text appended, and how many they are."""
    dtype = STORAGE_DTYPES[extension]
    pieces = [tokenizer.encode(piece).astype(dtype).tobytes() for piece in _pieces(text)]
    stored = b"".join([*pieces, dtype.type(tokenizer.end_of_text).tobytes()])
    return stored, len(stored) // dtype.itemsize
