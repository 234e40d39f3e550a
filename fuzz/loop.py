# SPDX-License-Identifier: Apache-2.0
"""How a target is run: by atheris where that is installed, else by a seeded loop of mutations over the corpus.

Decides nothing about images. The loop is deterministic for a seed: what it finds can be found again, and the input
that broke an invariant is written beside the working directory, as atheris does, to be handed to the program again.
`INV-BOUNDED` is watched here: too long or too much memory is a failure like any other exception.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vhdkit.units import GIB

Target: TypeAlias = Callable[[bytes], None]
Mutate: TypeAlias = Callable[[bytes, random.Random, Sequence[bytes]], bytes]

CORPUS = Path(__file__).resolve().parent / "corpus"
MAX_CASE_SECONDS = 5.0
MAX_LOOP_MEMORY = 2 * GIB  # of addresses; a case that wants more gets a MemoryError, which is a failure
_HANG_SECONDS = 60.0


class TooSlow(AssertionError):
    """A case broke the time bound of INV-BOUNDED."""


def seeds(name: str) -> list[tuple[str, bytes]]:
    """(name, input) of every seed of a target, sorted."""
    return [(path.name, path.read_bytes()) for path in sorted((CORPUS / name).iterdir()) if path.is_file()]


def timed(target: Target, data: bytes) -> float:
    """Run one case; returns its seconds of processor time, which a busy machine does not change. Raises TooSlow.

    Waiting for what never comes is not seen here: the loop's watchdog and the tests' timeout see to that.
    """
    start = time.process_time()
    target(data)
    seconds = time.process_time() - start
    if seconds > MAX_CASE_SECONDS:
        raise TooSlow(f"{seconds:.1f} s for one input; {MAX_CASE_SECONDS:.0f} s are allowed")
    return seconds


def mutations(inputs: Sequence[bytes], mutate: Mutate, seed: int, count: int) -> list[bytes]:
    """`count` inputs made from these, the same ones for the same seed."""
    rng = random.Random(seed)
    return [mutate(rng.choice(inputs), rng, inputs) for _ in range(count)]


def main(target: Target, name: str, mutate: Mutate, *, corpus: str | None = None) -> int:
    """The program of a target: `python -m fuzz.NAME [CORPUS or INPUT ...] [--seconds N] [--seed N]`.

    `corpus` names the target whose seeds it uses, where these are not its own.
    """
    try:
        atheris: Any = importlib.import_module("atheris")
    except ModuleNotFoundError:
        atheris = None
    if atheris is None:
        return _own_loop(target, name, mutate, corpus or name)

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return mutate(data, rng, [data])[:max_size]

    atheris.instrument_all()
    atheris.Setup(sys.argv, target, custom_mutator=custom)
    atheris.Fuzz()
    return 0


def _own_loop(target: Target, name: str, mutate: Mutate, corpus: str) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m fuzz.{name}", description=f"Fuzz {name} without atheris.")
    parser.add_argument("inputs", nargs="*", type=Path, default=[CORPUS / corpus], help="folders of seeds, or inputs")
    parser.add_argument("--seconds", type=float, default=60, help="how long")
    parser.add_argument("--seed", type=int, default=1, help="another number, other inputs")
    parser.add_argument("--keep-going", action="store_true", help="list every failure of its kind once")
    options = parser.parse_args()
    files = [path for one in options.inputs for path in (sorted(one.iterdir()) if one.is_dir() else [one])]
    inputs = [path.read_bytes() for path in files if path.is_file()]
    resource.setrlimit(resource.RLIMIT_AS, (MAX_LOOP_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    rng = random.Random(options.seed)
    end = time.monotonic() + options.seconds
    done, slowest, failures = 0, 0.0, set[str]()
    while done < len(inputs) or time.monotonic() < end:
        data = inputs[done] if done < len(inputs) else mutate(rng.choice(inputs), rng, inputs)
        faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
        try:
            slowest = max(slowest, timed(target, data))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            if kind not in failures:
                failures.add(kind)
                found = Path(f"crash-{hashlib.sha256(data).hexdigest()[:16]}")
                found.write_bytes(data)
                traceback.print_exc()
                print(f"{kind}: the input is in {found}", flush=True)
            if not options.keep_going:
                return 1
        done += 1
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{name}: {done} inputs, slowest {slowest:.2f} s, peak {peak} MiB, {len(failures)} kinds of failure")
    return 1 if failures else 0
