"""Data sets tokenised by a tokenizer.json: built, read, decoded, counted in bytes, and held to the very file."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from sixfold.cli.main import build_app
from sixfold.errors import DataError, RecipeError
from sixfold.recipe.load import load_recipe
from sixfold.train.fitting import check_data_fits
from sixfold.train.samples import Samples
from sixfold_data.build import BuildOptions
from sixfold_data.build_text import build_text
from sixfold_data.config import DataConfig
from sixfold_data.describe import describe
from sixfold_data.index import read_manifest
from sixfold_data.inspect import read_texts
from sixfold_data.json_tokenizer import JsonTokenizer
from sixfold_data.store import open_store
from sixfold_data.stream import TrainStream
from sixfold_data.verify import verify

END = "<|endoftext|>"
TEXTS = [f"The cat sat on the mat, and {number} others did too.\n" * 5 for number in range(20)]
TEXTS += ["Übermaß an Text: 漢字, ж.\n\n  Einrückung\tund Ende", f"a document that spells {END} as text"]


def train_bpe(file: Path, *, vocabulary: int = 320, end: str = END) -> Path:
    """A small byte-level BPE, trained on the texts."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(TEXTS, trainer)
    engine.save(str(file))
    return file


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with ``tokenizer.json``, texts, and the data set ``set`` made of them by the command."""
    root = tmp_path_factory.mktemp("bpe")
    train_bpe(root / "tokenizer.json")
    arguments = ["data", "build", "text", str(write_texts(root / "texts")), "--out", str(root / "set")]
    done = CliRunner().invoke(build_app(), [*arguments, "--tokenizer", str(root / "tokenizer.json"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["remarks"] == []
    return root


def test_every_document_comes_back_and_the_file_is_recorded_by_its_hash(built):
    store = open_store(str(built / "set"))
    manifest = read_manifest(store)
    content = (built / "tokenizer.json").read_bytes()
    assert manifest.tokenizer == {
        "type": "tokenizer.json",
        "sha256": hashlib.sha256(content).hexdigest(),
        "end_of_text": END,
    }
    found = [text.text for split in ("train", "val") for text in read_texts(store, manifest, split, 99, 10_000)]
    assert sorted(found) == sorted(TEXTS)
    assert verify(store).faults == []
    tokens = sum(split.tokens for split in manifest.splits.values()) - len(TEXTS)
    assert tokens < 0.7 * sum(len(text.encode()) for text in TEXTS), "pieces are longer than bytes"


def test_tokens_stand_for_the_bytes_of_the_text(built):
    tokenizer = JsonTokenizer.of_file(built)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
        assert tokenizer.end_of_text not in tokens
        assert tokenizer.decode([tokenizer.end_of_text, *tokens, tokenizer.end_of_text]) == text
    config = DataConfig(path=str(built / "set"), global_batch=2, sequence_length=32)
    info = describe(config)
    stream = TrainStream(config, seed=0, rank=0, world_size=1, start_samples=0, quarantine_path=None)
    for batch in itertools.islice(stream, 4):
        expected = torch.from_numpy(tokenizer.token_bytes)[batch["tokens"]]
        assert torch.equal(batch["token_bytes"], expected)
        assert expected.max() > 1
        rows = torch.where(batch["tokens"] == tokenizer.end_of_text, 324, batch["tokens"])  # a rounded-up vocabulary
        for text in Samples(fields={"tokens": rows}, conditions={}, info=info).texts:
            assert any(part in whole for part in text.split("\n")[1:2] for whole in TEXTS)


def test_another_tokenizer_in_the_folder_is_refused(built, tmp_path):
    root = shutil.copytree(built / "set", tmp_path / "set")
    train_bpe(root / "tokenizer.json", vocabulary=300)
    with pytest.raises(DataError, match="not the tokenizer that the data set was built with") as raised:
        describe(DataConfig(path=str(root), global_batch=2, sequence_length=32))
    assert raised.value.faults[0].where == f"{root}/tokenizer.json"
    assert any("not the tokenizer" in fault.what for fault in verify(open_store(str(root))).faults)
    (root / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        describe(DataConfig(path=str(root), global_batch=2, sequence_length=32))


def test_a_mixture_a_checkpoint_and_a_recipe_are_held_to_the_tokenizer(built, tmp_path):
    train_bpe(tmp_path / "tokenizer.json", vocabulary=300)
    build_text(built / "texts", BuildOptions(out=tmp_path / "set"), str(tmp_path))
    paths = [str(built / "set"), str(tmp_path / "set")]
    common = {"global_batch": 2, "sequence_length": 32}
    with pytest.raises(DataError, match="tokenizer is"):
        describe(DataConfig.model_validate({"mixture": [{"path": path, "weight": 1.0} for path in paths], **common}))
    one, other = (
        TrainStream(
            DataConfig.model_validate({"path": path, **common}),
            seed=0,
            rank=0,
            world_size=1,
            start_samples=0,
            quarantine_path=None,
        )
        for path in paths
    )
    with pytest.raises(DataError, match="fingerprint"):
        other.check_state(one.state())
    recipe = load_recipe("lm/moe-smoke", [f"data.path={built / 'set'}", "networks.lm.vocab_size=312"]).recipe
    with pytest.raises(RecipeError, match=r"vocab_size is 312, but the data set holds 320 tokens"):
        check_data_fits(recipe, describe(recipe.data))


def test_the_end_of_text_is_found_or_asked_for(tmp_path):
    file = train_bpe(tmp_path / "own.json", end="<finis>")
    with pytest.raises(DataError, match="--end-of-text") as raised:
        JsonTokenizer.of_file(file)
    assert raised.value.faults[0].allowed == "<finis>"
    assert JsonTokenizer.of_file(file, "<finis>").end_of_text == 0
    with pytest.raises(DataError, match="no special token '<other>'"):
        JsonTokenizer.of_file(file, "<other>")


def test_sentencepiece_pieces_count_the_blank_and_the_bytes_they_stand_for():
    vocabulary = {"</s>": 0, "<0x0A>": 1, "<0xE6>": 2, "▁": 3, "a": 4, "▁a": 5, "ü": 6}
    engine = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    engine.add_special_tokens(["</s>"])
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = JsonTokenizer(engine.to_str().encode())
    assert tokenizer.token_bytes.tolist() == [0, 1, 1, 1, 1, 2, 2]
    tokens = tokenizer.encode(" aü\n")
    assert tokens.tolist() == [5, 6, 1]
    assert tokenizer.decode(np.append(tokens, 0)) == " aü\n"


def test_what_is_no_tokenizer_of_a_kind_that_counts_bytes_is_refused(tmp_path):
    engine = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    engine.decoder = decoders.WordPiece()
    engine.add_special_tokens(["[EOS]"])
    with pytest.raises(DataError, match="WordPiece"):
        JsonTokenizer(engine.to_str().encode())
    with pytest.raises(DataError, match="no tokenizer that can be read"):
        JsonTokenizer(b"{}")
    with pytest.raises(DataError, match="allowed: bytes, characters"):
        build_text(write_texts(tmp_path / "texts"), BuildOptions(out=tmp_path / "out"), "klingon")


def test_a_tokenizer_that_loses_text_is_told_of(tmp_path):
    letters = {letter: number for number, letter in enumerate(["</s>", *"▁abcdefghijklmnopqrstuvwxyz"])}
    engine = Tokenizer(models.BPE(letters, []))
    engine.add_special_tokens(["</s>"])
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    engine.decoder = decoders.Metaspace(prepend_scheme="never")
    engine.save(str(tmp_path / "tokenizer.json"))
    report = build_text(write_texts(tmp_path / "texts"), BuildOptions(out=tmp_path / "out"), str(tmp_path))
    assert any("changes or loses text" in remark for remark in report.remarks)
