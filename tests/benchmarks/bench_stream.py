"""Decoded samples per second of the shuffled stream, against webdataset's and MosaicML streaming's on the same images.

    python tests/benchmarks/bench_stream.py [--peer-python PYTHON] [--workers 2]

``--peer-python`` names an interpreter that has MosaicML's ``streaming``; it is never installed beside the platform. All
readers take turns, so that a busy machine slows all of them; the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import subprocess
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from sixfold_data.config import DataConfig
from sixfold_data.decode import decode_image
from sixfold_data.index import FORMAT, Manifest, MemberPlace, SplitIndexWriter
from sixfold_data.stream import TrainStream

SAMPLES, SHARDS, SIZE, BATCH = 20_000, 10, 32, 64

PEER = """
import io, json, sys, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from streaming import MDSWriter, StreamingDataset
folder, source, workers, batch, rounds = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6])
if not folder.exists():
    with MDSWriter(out=str(folder), columns={"png": "bytes", "cls": "int"}) as writer:
        for file in sorted(source.iterdir()):
            writer.write({"png": file.read_bytes(), "cls": 0})
def decode(rows):
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["png"])).convert("RGB")) for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
for _ in range(rounds):
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    loader = iter(torch.utils.data.DataLoader(data, batch_size=batch, num_workers=workers, collate_fn=decode))
    next(loader)
    started, seen = time.perf_counter(), 0
    for images in loader:
        seen += len(images)
    print(json.dumps(seen / (time.perf_counter() - started)), flush=True)
    del data
"""


def make_pngs(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield keys and PNG files of smooth colour fields with a little noise, kept in ``folder`` for the peer."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for number in range(SAMPLES):
        slopes = random.uniform(-0.4, 0.4, size=(2, 3))
        waves = np.sin(rows[..., None] * slopes[0] + columns[..., None] * slopes[1] + random.uniform(0, 6, size=3))
        pixels = 127 + 100 * waves + random.normal(0, 4, size=(SIZE, SIZE, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
        (folder / f"{number:06d}.png").write_bytes(buffer.getvalue())
        yield f"{number:06d}", buffer.getvalue()


def make_data_set(root: Path, pngs: Path) -> list[str]:
    """Write the shards and their index; return the shards' paths."""
    writer = SplitIndexWriter("train")
    samples = make_pngs(pngs)
    shards = [root / "train" / f"shard-{number:06d}.tar" for number in range(SHARDS)]
    (root / "train" / "index").mkdir(parents=True)
    for shard in shards:
        contents = [next(samples) for _ in range(SAMPLES // SHARDS)]
        with tarfile.open(shard, "w") as tar:
            for key, content in contents:
                for name, member in ((f"{key}.png", content), (f"{key}.cls", b"0")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(member)
                    tar.addfile(entry, io.BytesIO(member))
        with tarfile.open(shard) as tar:
            offsets = {entry.name: entry.offset_data for entry in tar}
        for key, content in contents:
            place = MemberPlace(offsets[f"{key}.png"], len(content), zlib.crc32(content))
            writer.add_sample(key, {"png": place}, label=0)
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        writer.end_shard(f"train/{shard.name}", size=shard.stat().st_size, sha256=digest)
    entry, files = writer.finish()
    for path, content in files:
        (root / path).write_bytes(content)
    manifest = Manifest(
        format=FORMAT, kind="images", classes=("0",), image_size=(SIZE, SIZE), channels=3, splits={"train": entry}
    )
    (root / "dataset.json").write_bytes(manifest.sealed().to_bytes())
    return [str(shard) for shard in shards]


def rate_of_stream(root: Path, workers: int) -> float:
    """Samples/s of one epoch of the platform's stream, nothing kept from before."""
    config = DataConfig(path=str(root), global_batch=BATCH, workers=workers, keep_decoded_bytes=0)
    stream = TrainStream(config, seed=0, rank=0, world_size=1, start_samples=0, quarantine_path=None)
    rate = _rate(batch["image"] for batch, _ in zip(stream, range(SAMPLES // BATCH), strict=False))
    stream.close()
    return rate


def rate_of_webdataset(shards: list[str], workers: int, decode: Callable[[bytes], np.ndarray] | None) -> float:
    """Samples/s of one epoch of webdataset with its own PNG decoder, or with the platform's."""
    data = webdataset.WebDataset(shards, shardshuffle=SHARDS, seed=0).shuffle(1000)
    data = data.decode("rgb8") if decode is None else data.map_dict(png=decode)
    loader = torch.utils.data.DataLoader(
        data.to_tuple("png", "cls").batched(BATCH, collation_fn=_images), batch_size=None, num_workers=workers
    )
    return _rate(loader)


def rates_of_streaming(python: str, folder: Path, pngs: Path, workers: int, rounds: int) -> list[float]:
    """Samples/s of epochs of MosaicML streaming in its own interpreter and format."""
    command = [python, "-c", PEER, str(folder), str(pngs), str(workers), str(BATCH), str(rounds)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines() if line[:1].isdigit()]


def _images(rows: list[tuple[np.ndarray, object]]) -> torch.Tensor:
    stacked = torch.from_numpy(np.stack([image for image, _ in rows]))
    return stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _decode_rgb(content: bytes) -> np.ndarray:
    return decode_image(content, channels=3)


def _rate(batches: Iterator[torch.Tensor] | torch.utils.data.DataLoader) -> float:
    """Rate after the first batch: starting processes and filling buffers is not what is compared."""
    iterator = iter(batches)
    assert next(iterator).dtype == torch.float32
    started, seen = time.perf_counter(), 0
    for images in iterator:
        seen += len(images)
    return seen / (time.perf_counter() - started)


def main() -> None:
    """Make the data, let the readers take turns, print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root, pngs = Path(temporary, "data"), Path(temporary, "pngs")
        shards = make_data_set(root, pngs)
        for workers in options.workers:
            rates: dict[str, list[float]] = {}
            for _ in range(options.rounds):
                rates.setdefault("sixfold", []).append(rate_of_stream(root, workers))
                rates.setdefault("webdataset", []).append(rate_of_webdataset(shards, workers, None))
                rates.setdefault("webdataset, our decoder", []).append(rate_of_webdataset(shards, workers, _decode_rgb))
            if options.peer_python:
                folder = Path(temporary, "mds")
                found = rates_of_streaming(options.peer_python, folder, pngs, workers, options.rounds)
                rates["streaming"] = found
            ours = statistics.median(rates["sixfold"])
            for name, values in rates.items():
                median = statistics.median(values)
                print(f"workers={workers} {name:24} {median:9.0f} samples/s  (sixfold is {ours / median:.1f} times it)")


if __name__ == "__main__":
    main()
