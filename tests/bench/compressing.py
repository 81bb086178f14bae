"""What compression saves, and how fast it is, on the tensors of a real checkpoint.

    python -m tests.bench.compressing FOLDER       of a checkpoint with plain *.safetensors files

For each file, and for the weights cast to bf16: the fraction saved, MB/s of plain bytes compressed
with one and with two threads, and MB/s decoded, hashes of the plain bytes included. The best of
several rounds, as other work on the machine only ever adds. Files are repeated up to 64 MiB, or the
figures would be those of starting threads; chunks are compressed each by itself, so no repetition
is seen by the compressor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from runner.checkpoint.frames import Forms, chunk_bytes_for, decode, encode

LEAST_BYTES = 64 << 20
ROUNDS = 5


def best_seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def figures(image: bytes) -> dict[str, float]:
    """Of one safetensors file."""
    memory = memoryview(image)
    forms, step = Forms(memory, "file"), chunk_bytes_for(len(image))
    chunks = [
        (memory[at : at + step], forms.between(at, at + step)) for at in range(0, len(image), step)
    ]
    frames = [encode(chunk, form) for chunk, form in chunks]
    digests = [sha256(chunk).hexdigest() for chunk, _ in chunks]
    times = max(1, LEAST_BYTES // len(image))
    nbytes = times * len(image)
    places = [memoryview(bytearray(len(chunk))) for chunk, _ in times * chunks]

    def compress(number: int) -> None:
        chunk, form = chunks[number % len(chunks)]
        encode(chunk, form)
        sha256(chunk).digest()

    def decompress(number: int) -> None:
        chunk = number % len(chunks)
        decode(memoryview(frames[chunk]), places[number], digests[chunk])

    def speed(work: Callable[[int], None], threads: int) -> float:
        numbers = range(times * len(chunks))
        with ThreadPoolExecutor(threads) as pool:
            return nbytes / 1e6 / best_seconds(lambda: list(pool.map(work, numbers)))

    result = {
        "bytes": float(len(image)),
        "saved": 1 - sum(map(len, frames)) / len(image),
        "compress_1_thread": speed(compress, 1),
        "compress_2_threads": speed(compress, 2),
        "decompress_1_thread": speed(decompress, 1),
        "decompress_2_threads": speed(decompress, 2),
    }
    assert b"".join(places) == times * image
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Compression of a checkpoint's files.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    images = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    weights = safetensors.torch.load(images["model.safetensors"])
    halves = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    images["model.safetensors as bf16"] = safetensors.torch.save(halves)
    table = {name: figures(image) for name, image in images.items()}
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
