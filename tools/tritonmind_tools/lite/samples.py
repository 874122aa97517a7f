"""What a model is calibrated on: samples of `seqlen` tokens each, drawn from a dataset."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tritonmind.errors import ConfigError, InvalidRequestError
from tritonmind_tools.text_data import FORMATS, Document, encode, read_documents

if TYPE_CHECKING:
    import torch

    from tritonmind.chat_template import ChatTemplate
    from tritonmind.tokenizer import Tokenizer

# How much more text than is needed is read before the draw, so that another seed draws other samples.
_POOL_FACTOR = 8
# Of English text it is about 4: the pool is rather too large than too small.
_CHARACTERS_PER_TOKEN = 5


class HubDataset(NamedTuple):
    """A dataset of the Hugging Face hub: arguments of datasets.load_dataset, the column with the text.

    joined: an entry is a line of one long text, not a document.
    """

    arguments: dict[str, str]
    column: str
    joined: bool = False


NAMED = {
    "c4": HubDataset({"path": "allenai/c4", "name": "en", "split": "train"}, "text"),
    "ptb": HubDataset(
        {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "split": "train"},
        "sentence",
        joined=True,
    ),
    "wikitext2": HubDataset(
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"}, "text", joined=True
    ),
    "pileval": HubDataset({"path": "mit-han-lab/pile-val-backup", "split": "validation"}, "text"),
}


def open_documents(dataset: str, path: Path | None, *, allow_download: bool) -> Iterator[Document]:
    """The documents of `dataset`: a file, or one of NAMED whose text is in the file `path` or may be downloaded.

    Raises ConfigError naming the option that is missing, contradicts another or names no file.
    """
    if dataset not in NAMED:
        if path is not None:
            raise ConfigError(f"--calib_path is for the datasets {', '.join(NAMED)}; --calib_dataset={dataset} is none")
        if not Path(dataset).is_file():
            raise ConfigError(
                f"--calib_dataset={dataset!r} is neither a file ({', '.join(FORMATS)}) nor one of {', '.join(NAMED)}"
            )
        return read_documents(Path(dataset))
    if path is not None:
        return read_documents(path)
    if not allow_download:
        raise ConfigError(
            f"--calib_dataset={dataset}: name a local copy with --calib_path FILE ({', '.join(FORMATS)}), "
            "or let it be downloaded from the Hugging Face hub with --allow_download"
        )
    return _hub_documents(dataset)


def draw_samples(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    num_samples: int,
    seqlen: int,
    seed: int,
) -> torch.Tensor:
    """Token ids [num_samples, seqlen] int32, every sample beginning where a document does, as a prompt would.

    Documents are shuffled by `seed`, those shorter than a sample put behind each other; of a longer one the beginning
    is taken. Conversations that the template refuses are passed over. Raises ConfigError when there is too little text.
    """
    import torch

    pool = _pool(documents, num_characters=_POOL_FACTOR * _CHARACTERS_PER_TOKEN * num_samples * seqlen, seqlen=seqlen)
    if not pool:
        raise ConfigError("--calib_dataset holds no text")
    random.Random(seed).shuffle(pool)
    samples: list[list[int]] = []
    sample: list[int] = []
    num_tokens = 0
    for document in pool:
        try:
            token_ids = encode(document, tokenizer, template)
        except InvalidRequestError:
            continue
        num_tokens += len(token_ids)
        sample += token_ids
        if len(sample) >= seqlen:
            samples.append(sample[:seqlen])
            sample = []
            if len(samples) == num_samples:
                return torch.tensor(samples, dtype=torch.int32)
    raise ConfigError(
        f"--calib_dataset has {num_tokens} tokens, enough for {len(samples)} samples of --calib_seqlen={seqlen}, "
        f"not for --calib_samples={num_samples}: give more text, or lower one of the two"
    )


def _pool(documents: Iterable[Document], *, num_characters: int, seqlen: int) -> list[Document]:
    """The first documents with so many characters together, long texts cut at ends of lines.

    Of one document no more characters count than a sample may have: what is behind them is of no use.
    """
    pool: list[Document] = []
    for document in documents:
        for piece in _pieces(document, 2 * _CHARACTERS_PER_TOKEN * seqlen):
            pool.append(piece)
            length = len(piece) if isinstance(piece, str) else sum(len(turn["content"]) for turn in piece)
            num_characters -= min(length, _CHARACTERS_PER_TOKEN * seqlen)
            if num_characters <= 0:
                return pool
    return pool


def _pieces(document: Document, num_characters: int) -> Iterator[Document]:
    """A text in pieces of at least so many characters, the last shorter; a conversation whole."""
    if not isinstance(document, str):
        yield document
        return
    start = 0
    while start < len(document):
        end = document.find("\n", start + num_characters) + 1 or len(document)
        # A text without lines.
        end = min(end, start + 2 * num_characters)
        yield document[start:end]
        start = end


def _hub_documents(name: str) -> Iterator[Document]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            "--allow_download needs the package datasets: pip install 'tritonmind[quant]', or give --calib_path"
        ) from None
    dataset = NAMED[name]
    try:
        entries: Iterable[Any] = datasets.load_dataset(**dataset.arguments, streaming=True)
        texts = (entry[dataset.column] for entry in entries if entry[dataset.column].strip())
        if dataset.joined:
            yield "\n".join(text.rstrip("\n") for text in texts)
        else:
            yield from texts
    # Whatever the library and the network under it raise: there is no common type.
    except Exception as error:
        raise ConfigError(
            f"--calib_dataset={name} cannot be downloaded ({error}): download it elsewhere and give --calib_path FILE"
        ) from error
