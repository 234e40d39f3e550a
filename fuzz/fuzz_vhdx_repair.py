# SPDX-License-Identifier: Apache-2.0
"""INV-REPAIR-WHOLE and INV-BOUNDED for VHDX: what `fuzz_repair` tries, with images and changes of VHDX.

Fed: one file, as `fuzz_vhdx_open`, with the same seeds. In half of the changes a checksum is wrong as well, so that
headers and region tables must be restored.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from fuzz.fuzz_repair import target
from fuzz.loop import main
from fuzz.mutate_vhdx import HEADERS, REGION_TABLES, mutate_vhdx
from fuzz.sparse import decode

SEEDS = "fuzz_vhdx_open"
_FRONT = (*HEADERS, *REGION_TABLES)


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """As `mutate_vhdx`, and often with bytes of a header or region table that its checksum does not cover any more."""
    data = mutate_vhdx(data, rng, others)
    if rng.random() < 0.5:
        return data
    image = decode(data)
    for place in rng.sample(_FRONT, rng.choice((1, 1, 2, 2, 4))):
        if place < image.size:
            image.put(place + rng.choice((0, 4, 4, 5, 16, 48, 72, 3000)), rng.randbytes(rng.choice((1, 4, 16))))
    return image.encode()


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_vhdx_repair", mutate, corpus=SEEDS))
