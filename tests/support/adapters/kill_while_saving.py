"""Program that kills a process while it saves an adapter, beside one that reads it.

Run as: kill_while_saving.py FOLDER KILLS; prints the failures as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch

from vpt_fast import VPTDeep, prompt_tune, save_adapter
from vpt_fast.adapter.files import CONFIG_FILE, TENSORS_FILE, read_adapter


def child(work: Any) -> int:
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    return process


def fault(adapter: Path) -> str | None:
    """Return what is wrong with the saved adapter, or None."""
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (adapter / name).is_file():
            return f"there is no {name}"
    try:
        config, tensors = read_adapter(adapter)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    version = tensors["prompt_tokens"].flatten().unique()
    if len(version) != 1 or config["class_names"] != [str(int(version)), "other"]:
        return "the two files are from two saves"
    return None


def read_until_stopped(adapter: Path, pipe: int) -> None:
    looks, failures, stopped = 0, [], []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    while not stopped:
        failure = fault(adapter)
        looks += 1
        if failure:
            failures.append(failure)
    os.write(pipe, json.dumps({"looks": looks, "failures": failures[:5]}).encode())


def main() -> None:
    adapter, kills = Path(sys.argv[1]) / "adapter", int(sys.argv[2])
    torch.set_num_threads(1)  # a process that was forked has no pool of threads
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2,
        num_classes=2,
    )  # fmt: skip
    tuned: Any = prompt_tune(model, VPTDeep(2, shared=True))

    def save(version: int) -> None:
        with torch.no_grad():
            tuned.prompt_tokens.fill_(float(version))
        save_adapter(tuned, adapter, class_names=[str(version), "other"], overwrite=True)

    started, start_signal = os.pipe()

    def save_for_ever() -> None:
        version = 0
        os.write(start_signal, b".")
        while True:
            version += 1
            save(version)

    save(0)
    source, sink = os.pipe()
    reader = child(lambda: read_until_stopped(adapter, sink))
    start = time.perf_counter()
    for _ in range(5):
        save(0)
    takes = (time.perf_counter() - start) / 5
    draw, broken, left_behind = random.Random(0), [], 0
    for _ in range(kills):
        process = child(save_for_ever)
        os.read(started, 1)
        time.sleep(draw.uniform(0, 2 * takes))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        left_behind += len(list(adapter.parent.iterdir())) > 1
        failure = fault(adapter)
        if failure:
            broken.append(failure)
    os.kill(reader, signal.SIGTERM)
    read = json.loads(os.read(source, 1 << 16))
    save(0)
    left_over = sorted(path.name for path in adapter.parent.iterdir())
    print(json.dumps({**read, "broken": broken[:5], "left_behind": left_behind, "end": left_over}))


if __name__ == "__main__":
    main()
