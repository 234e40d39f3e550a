# SPDX-License-Identifier: Apache-2.0
"""Write the seeds: small, sound or nearly sound inputs from which mutations start. `python -m fuzz.make_corpus`.

Decides which states of an image each target begins with. Deterministic: the same files every time, and a test
compares them with what lies in `fuzz/corpus`. A file that broke an invariant once is kept there as `found-*`.
"""

from __future__ import annotations

from collections.abc import Iterator

from fuzz import fuzz_merge, fuzz_switch, seeds_vhdx
from fuzz.fuzz_hyperv import packed_file
from fuzz.loop import CORPUS
from fuzz.recipe import (
    ALLOW_EXTRA,
    ALLOW_RAW,
    DIFF,
    DIFF_X,
    DYN,
    DYN_X,
    EMPTY,
    FIX,
    HARD,
    LINK,
    NO_LOCK,
    RAW,
    WRITABLE,
    Entry,
    Link,
    Recipe,
)
from fuzz.sparse import Sparse
from tests import nbd_client as nbd
from tests.harness.chains import ChainPlan, LayerPlan
from tests.harness.vhd_builder import (
    FIXED,
    FREE,
    GIB,
    KIB,
    MIB,
    TIB,
    Block,
    Locator,
    Vhd,
    absolute,
    child,
    relative,
)  # fmt: skip
from tests.nbd_client import go_data, meta_data, option
from tests.vmm.hyperv import writing as hyperv
from tests.vmm.net import packets
from vhdkit.chain.records.intent import Intent, Named, Phase
from vmm.hyperv.ids import ADAPTER, IDE, SCSI

MAX_SEED_BYTES = 8 * KIB
W2RU, W2KU, MACX, WI2R = range(4)


def packed(vhd: Vhd) -> bytes:
    """An image of the builder as a sparse input: runs of one byte become repeats."""
    built = vhd.build()
    image = Sparse(built.size)
    for offset, raw in built.pieces:
        position = 0
        while position < len(raw):
            size = min(512, len(raw) - position)
            piece, stop = raw[position : position + size], position + size
            if piece.count(piece[0]) == size:
                while raw[stop : stop + 512] == piece:
                    stop += 512
                image.put(offset + position, piece[:1], stop - position)
            else:
                image.put(offset + position, piece.rstrip(b"\0"))
            position = stop
    return image.encode()


def full_table(entry: int | None, block_size: int, size: int) -> bytes:
    """A disk with a table of equal entries; a far one where `entry` is None: all free, at 4 GiB."""
    vhd = Vhd(size=MIB, block_size=block_size, table_offset=4 * GIB if entry is None else None, tail=b"")
    count = -(-size // block_size)
    vhd.entry_count = vhd.needed_entries
    head = Vhd(size=size, block_size=block_size, table_offset=vhd.table_offset)
    table = head.table_at
    image = Sparse(table + count * 4 + 512)
    image.put(0, head.footer())
    image.put(512, head.header())
    image.put(table, (FREE if entry is None else entry).to_bytes(4, "big"), count)
    image.put(image.size - 512, head.footer())
    return image.encode()


def open_seeds() -> Iterator[tuple[str, bytes]]:
    """Images, each in a state of its own."""
    two = {1: Block(b"second"), 0: Block(b"first", bits=b"\xf0\x01")}
    yield "empty", b""
    yield "raw", b"just bytes, no image" * 40
    yield "raw-odd", Sparse(3 * MIB + 17, [(5, b"x", 1), (MIB, b"y", 1)]).encode()
    yield "qcow2", b"QFI\xfb" + bytes(600)
    yield "fixed", packed(Vhd(disk_type=FIXED, data=b"boot"))
    yield "fixed-511", packed(Vhd(disk_type=FIXED, footer_size=511))
    yield "fixed-bytes", b"d" * 1024 + Vhd(disk_type=FIXED, size=1024).footer()
    yield "fixed-chs", packed(Vhd(disk_type=FIXED, creator=b"vpc ", chs=(60, 4, 17), size=4 * MIB))
    yield "fixed-2tib", packed(Vhd(disk_type=FIXED, size=2 * TIB, data=b"boot"))
    yield "dynamic", packed(Vhd(blocks=two))
    yield "dynamic-aligned", packed(Vhd(blocks=two, aligned=True, block_size=512 * KIB))
    yield "dynamic-chs", packed(Vhd(blocks=two, creator=b"qemu", chs=(60, 4, 17)))
    yield "dynamic-cut", packed(Vhd(blocks=two, tail=b"", footer_at=2 * MIB + 4096))
    yield "dynamic-cut-footer", packed(Vhd(blocks=two, footer_at=2 * MIB + 4096))
    yield "dynamic-killed", packed(Vhd(blocks=two, tail=b"\xc7" * 512))
    yield "dynamic-poisoned", packed(Vhd(blocks=two, tail=b"v_poison".ljust(512, b"\0")))
    yield "dynamic-no-copy", packed(Vhd(blocks=two, copy=bytes(512)))
    yield "dynamic-no-tail", packed(Vhd(blocks=two, tail=b""))
    yield "dynamic-spare", packed(Vhd(blocks=two, entry_count=300, junk=b"junk" * 30))
    yield "dynamic-256m", packed(Vhd(size=300 * MIB, block_size=256 * MIB, blocks={1: Block(b"z", at=MIB)}))
    yield "dynamic-one-sector", packed(Vhd(size=512, blocks={0: Block(b"s")}))
    yield "dynamic-odd-size", packed(Vhd(size=4 * MIB - 512 * 3, blocks=two))
    yield "dynamic-header-far", packed(Vhd(header_offset=8192, blocks=two))
    yield "dynamic-far-block", packed(Vhd(blocks={0: Block(b"far", start=2 * TIB - 4 * MIB)}))
    yield "overlap", packed(Vhd(blocks=two, entries={0: 4, 1: 5}))
    yield "tap-batmap", packed(Vhd(creator=b"tap\0", creator_version=0x10003, batmap=b"\xc0", blocks=two))
    every = {0: relative(".\\p.vhd"), 1: absolute("C:\\p.vhd"), 2: Locator(b"MacX", b"file://localhost/p%20.vhd")}
    every |= {5: Locator(b"Wi2r", b"p.vhd"), 7: Locator(b"Wi2k", b"c:\\p.vhd", space=1)}
    yield "child", packed(child(blocks=two, locators=every))
    yield "child-text-far", packed(child(blocks=two, locators={0: Locator(b"W2ru", b"", length=65537, offset=TIB)}))
    strange = {3: Locator(b"W2ku", b"\x00\xd8\x00"), 4: Locator(b"\x1b[2J", b"", length=65537)}
    yield "child-undecodable", packed(child(locators=strange))
    yield "table-free-2tib", full_table(None, MIB, 2 * TIB)
    yield "table-zeros-64gib", full_table(0, 512 * KIB, 64 * GIB)
    yield "table-zeros-2tib", full_table(0, MIB, 2 * TIB)
    yield "table-equal-256gib", full_table(0x9000, MIB, 256 * GIB)
    yield "table-outside-256gib", full_table(0xFFFFFFFE, MIB, 256 * GIB)
    yield "table-over-header", packed(Vhd(table_offset=520))
    yield "table-over-copy", packed(Vhd(table_offset=0, entries={0: FREE}))
    yield "header-over-copy", packed(Vhd(header_offset=256, table_offset=4096))


def chain_seeds() -> Iterator[tuple[str, bytes]]:
    """Folders: sound chains, and one for each trick."""
    base = Entry(name=1, kind=DYN, own_id=2)

    def leaf(*links: Link, name: bytes = b"", parent_id: int = 2) -> Entry:
        return Entry(parent_id=parent_id, parent_name=name, links=list(links), shape=0x10)

    def with_text(text: bytes, code: int = W2RU, *more: Entry, flags: int = WRITABLE) -> bytes:
        return Recipe(flags, [leaf(Link(code, text)), *more]).encode()

    yield "two", with_text(b".\\parent.vhd", W2RU, base)
    yield "header-name-only", Recipe(WRITABLE, [leaf(name=b"parent.vhd"), base]).encode()
    yield "ignoring-case", with_text(b"PARENT.VHD", W2RU, base)
    middle = Entry(name=3, own_id=2, parent_id=3, links=[Link(W2RU, b"..\\base.vhd")])
    yield "three", with_text(b"sub\\inner.vhd", W2RU, middle, Entry(name=2, kind=FIX, own_id=3))
    yield "loop-of-one", Recipe(0, [leaf(Link(W2RU, b"leaf.vhd"), parent_id=1)]).encode()
    back = Entry(name=1, own_id=2, parent_id=1, links=[Link(W2RU, b"leaf.vhd")])
    yield "loop-of-two", with_text(b"parent.vhd", W2RU, back)
    yield "loop-by-hard-link", Recipe(0, [leaf(Link(W2RU, b"parent.vhd"), parent_id=1), Entry(1, HARD)]).encode()
    yield "outside", with_text(b"..\\outside\\parent.vhd")
    yield "outside-absolute", with_text(b"%O/parent.vhd", W2KU)
    yield "outside-mac", with_text(b"file://%O/parent.vhd", MACX)
    yield "outside-link", with_text(b"link.vhd", W2KU)
    yield "outside-link-ignoring-case", with_text(b"LINK.vhd")
    yield "outside-folder-ignoring-case", with_text(b"LINKDIR\\PARENT.VHD")
    yield "outside-link-of-its-own", with_text(b"parent.vhd", W2RU, Entry(1, LINK, parent_name=b"%O/parent.vhd"))
    yield "extra-folder", with_text(b"C:\\elsewhere\\parent.vhd", W2KU, flags=ALLOW_EXTRA)
    yield "pipe", with_text(b"pipe.vhd")
    yield "folder", with_text(b"folder.vhd")
    yield "device", with_text(b"/dev/zero", WI2R)
    yield "zero-byte", with_text(b"file:///a%00b", MACX)
    yield "long", with_text(b"a/" * 2000)
    no_id = leaf(Link(W2RU, b"base.vhd"), parent_id=0)
    yield "raw-parent", Recipe(ALLOW_RAW, [no_id, Entry(2, RAW, parent_name=b"r")]).encode()
    yield "raw-parent-like-another", Recipe(ALLOW_RAW, [no_id, Entry(2, RAW, parent_name=b"QFI\xfb")]).encode()
    yield "raw-parent-empty", Recipe(ALLOW_RAW, [no_id, Entry(2, EMPTY)]).encode()
    yield "raw-parent-refused", Recipe(NO_LOCK, [no_id, Entry(2, RAW)]).encode()
    yield "wrong-id", with_text(b"parent.vhd", W2RU, Entry(1, DYN, 4))
    yield "control-characters", with_text(b"new\nline\x1b[31m.vhd", W2RU, Entry(11, DYN, 4))
    wild = [Link(code, b"\xff\xd8\x00", 1 + code % 3) for code in range(7)]
    yield "wild-locators", Recipe(0, [leaf(*wild), base]).encode()
    sibling = Entry(name=2, own_id=5, parent_id=1, links=[Link(W2RU, b"leaf.vhd")])
    yield "has-children", with_text(b"parent.vhd", W2RU, base, sibling)
    yield "damaged-parent", with_text(b"parent.vhd", W2RU, Entry(1, DYN, 2, patches=[(1536, b"\0\0\0\1")]))
    yield from vhdx_chain_seeds()
    yield "child-of-type-zero", Recipe(0, [Entry(kind=DIFF, patches=[(60, b"\0\0\0\0")])]).encode()


def vhdx_chain_seeds() -> Iterator[tuple[str, bytes]]:
    """The same for VHDX files. Names prove nothing, so theirs are those of VHDs."""
    base = Entry(name=1, kind=DYN_X, own_id=2, shape=0x09)

    def leaf(*links: Link, shape: int = 0x10, parent_id: int = 2) -> Entry:
        return Entry(kind=DIFF_X, parent_id=parent_id, links=list(links), shape=shape)

    to_parent = Link(W2RU, b".\\parent.vhd")
    yield "vhdx-two", Recipe(WRITABLE, [leaf(to_parent), base]).encode()
    middle = Entry(name=3, kind=DIFF_X, own_id=2, parent_id=3, shape=0x14, links=[Link(W2KU, b"..\\base.vhd")])
    bottom = Entry(name=2, kind=DYN_X, own_id=3, shape=2)
    yield "vhdx-three", Recipe(WRITABLE, [leaf(Link(W2RU, b"sub\\inner.vhd"), shape=2), middle, bottom]).encode()
    yield "vhdx-linkage2", Recipe(WRITABLE, [leaf(to_parent, shape=0x30, parent_id=1), base]).encode()
    yield "vhdx-loop", Recipe(0, [leaf(Link(W2RU, b"leaf.vhd"), parent_id=1)]).encode()
    yield "vhdx-outside", Recipe(WRITABLE, [leaf(Link(W2RU, b"..\\outside\\parent.vhd"))]).encode()
    yield "vhdx-outside-absolute", Recipe(WRITABLE, [leaf(Link(W2KU, b"%O/parent.vhd"))]).encode()
    yield "vhdx-on-vhd", Recipe(WRITABLE, [leaf(to_parent), Entry(name=1, kind=DYN, own_id=2)]).encode()
    child = Entry(parent_id=2, links=[Link(W2RU, b"parent.vhd")], shape=0x10)
    yield "vhd-on-vhdx", Recipe(WRITABLE, [child, base]).encode()
    patched = Entry(name=1, kind=DYN_X, own_id=2, patches=[(0, b"\x06\0\x40"), (2048, b"\xff" * 30)])
    yield "vhdx-damaged-parent", Recipe(WRITABLE, [leaf(to_parent), patched]).encode()


def merge_seeds() -> Iterator[tuple[str, bytes]]:
    """Chains to be merged: each kind of target, sizes that differ, damage of each kind; and records."""

    def layer(kind: str, sectors: int, block: int, *runs: tuple[int, int]) -> LayerPlan:
        return LayerPlan(kind, sectors, block * KIB, runs)

    leaf = layer("differencing", 3000, 512, (0, 9), (1024, 1024), (2900, 100))
    middle = layer("differencing", 3000, 1024, (5, 40), (1000, 100), (2040, 20))
    for kind in ("raw", "fixed", "dynamic"):
        base = layer(kind, 3000, 512, (0, 700), (1500, 1500))
        yield f"into-{kind}", fuzz_merge.encode(ChainPlan((leaf, base)), 1)
        yield f"new-{kind}", fuzz_merge.encode(ChainPlan((leaf, middle, base)), 2, fresh=True)
    base = layer("dynamic", 3000, 2048, (0, 3000))
    chain = ChainPlan((leaf, middle, base))
    yield "into-middle", fuzz_merge.encode(chain, 1)
    yield "two-into-base", fuzz_merge.encode(chain, 2)
    yield "ignoring-bitmaps", fuzz_merge.encode(ChainPlan(chain.layers, True), 2)
    small = layer("differencing", 700, 512, (600, 100))
    yield "smaller-between", fuzz_merge.encode(ChainPlan((leaf, small, middle, base)), 2)
    yield "smaller-new", fuzz_merge.encode(ChainPlan((leaf, small, base)), 1, fresh=True)
    for number, name in enumerate(("bits", "table", "cut", "bytes")):
        damage = [(one, number, 300 + one, 77) for one in range(3)]
        yield f"damaged-{name}", fuzz_merge.encode(chain, 2, damages=damage)
    one = Named("/srv/images/leaf.avhd", bytes(range(16)))
    base_name = Named("/srv/images/base.vhd", bytes(16))
    yield "record", Intent(Phase.REMOVE, base_name, (one,), False).encode()
    outside = Named("/etc/passwd", bytes(16))
    yield "record-outside", Intent(Phase.REMOVE, base_name, (outside,), True).encode()
    # A folder with a record (`fuzz_merge._claim`): a true one, one of which the leaf is gone, links and foreign files.
    for name, sources in (("true", (1, 2)), ("gone", (3, 2)), ("foreign", (3, 5, 6, 7)), ("elsewhere", (3, 8, 9))):
        claim = bytes([129, 2, 0, 1, len(sources)]) + bytes(byte for one in sources for byte in (one, 0))
        yield f"acting-{name}", claim


def nbd_seeds() -> Iterator[tuple[str, bytes]]:
    """Conversations of NBD clients: a byte for the TLS mode, flags, options, requests."""
    structured, extended = option(nbd.STRUCTURED), option(nbd.EXTENDED)
    contexts = option(nbd.SET_META, meta_data(["base:allocation", "qemu:allocation-depth"], "disk"))
    go, fixed = option(nbd.GO, go_data("disk", (0, 1, 2, 3))), b"\0\0\0\0\3"
    looks = option(nbd.LIST) + option(nbd.INFO, go_data("")) + option(nbd.LIST_META, meta_data([], "disk")) + option(4)
    for name, before in (("simple", b""), ("structured", structured + contexts), ("extended", extended + contexts)):
        is_extended = name == "extended"
        write = nbd.request(nbd.WRITE, 4096, 8, flags=32 if is_extended else 0, extended=is_extended) + b"payload!"
        commands = [
            (nbd.READ, 512),
            (nbd.FLUSH, 0),
            (nbd.TRIM, 512),
            (nbd.CACHE, 9),
            (nbd.ZEROES, 7),
            (nbd.STATUS, 4096),
        ]
        sent = b"".join(nbd.request(one, 0, length, cookie=one, extended=is_extended) for one, length in commands)
        yield name, fixed + looks + before + go + sent + write + nbd.request(nbd.DISC, extended=is_extended)
    chosen = nbd.request(nbd.STATUS, 0, 16, flags=32, extended=True) + bytes([0] * 6 + [2] + [0] * 4 + [1, 0, 0, 0, 2])
    yield "filter", fixed + extended + contexts + go + chosen
    yield "export-name", b"\0\0\0\0\0" + option(nbd.EXPORT_NAME, b"read-only") + nbd.request(nbd.ZEROES, 0, 1)
    yield "tls", b"\1\0\0\0\3" + structured + option(nbd.STARTTLS) + go
    yield "tls-required", b"\2\0\0\0\3" + go + option(nbd.EXPORT_NAME)
    yield "abort", fixed + option(nbd.ABORT, b"bye")
    yield "long", fixed + option(nbd.LIST, bytes(70000))[:200]
    yield (
        "refused-writes",
        fixed + go + nbd.request(nbd.WRITE, 1 << 63, 5, flags=0x8000) + b"12345" + nbd.request(nbd.READ),
    )


def switch_seeds() -> Iterator[tuple[str, bytes]]:
    """Frames between three ports: stations that talk, tags, guards' targets, nonsense."""
    one, two = packets.mac(1), packets.mac(2)
    talk = [(0, packets.ethernet(two, one)), (1, packets.ethernet(one, two)), (0, packets.ethernet(two, one))]
    tags = [(port, packets.ethernet(two, one, vlan=vlan)) for port in range(3) for vlan in (0, 10, 20, 4095)]
    guards = [(0, packets.dhcp_offer(one)), (1, packets.router_advertisement(two))]
    guards.append((2, packets.router_advertisement(one, bytes([58, 0]) + bytes(6), 60)))
    for rules in (0, 1, 31, 62, 93, 124):
        for name, sent in (("talk", talk), ("tags", tags), ("guards", guards)):
            yield f"{name}-{rules}", bytes([rules]) + b"".join(fuzz_switch.record(port, one) for port, one in sent)
    short = b"".join(fuzz_switch.record(0, packets.ethernet(two, one, vlan=5)[:size], 100) for size in range(20))
    yield "short", b"\0" + short


def hyperv_seeds() -> Iterator[tuple[str, bytes]]:
    """Configurations of one machine in both encodings, with an active log, with long values."""
    scsi, card = "5c510000-0000-4000-8000-000000000001", "4e1c0000-0000-4000-8000-000000000001"
    disk = {"controller0": {"drive0": {"type": "VHD", "pathname": "C:\\a.vhdx"}}}
    parts: dict[str, object] = {
        "properties": {
            "name": "web", "notes": "one\r\ntwo", "global_id": "11111111-2222-4333-8444-555555555501", "subtype": 0,
            "version": 1280, "creation_time": bytes(range(8)), "type_id": "Virtual Machines",
        },
        "settings": {
            "memory": {"bank": {"size": 1024, "dynamic_memory_enabled": True, "limit": 2048, "reservation": 512}},
            "processors": {"count": 2},
        },
        "manifest": {
            "vdev001": {"device": SCSI, "instance": scsi.upper(), "name": "SCSI"},
            "vdev002": {"device": ADAPTER, "instance": card.upper(), "name": "adapter"},
        },
        f"_{scsi}_": disk,
        f"_{card}_": {"MacAddress": "00-15-5D-01-02-03", "IsConnected": True, "Connection": {"AltSwitchName": "lan"}},
        f"_{IDE}_": disk,
    }  # fmt: skip
    tree = hyperv.tree(configuration=parts)
    yield "vmcx", packed_file(hyperv.Writer(slack=2).write(tree))
    yield "vmcx-log", packed_file(hyperv.Writer().write(tree, [(0x7F00, b"data"), (0x7F02, b"more")]))
    yield "vmcx-long", packed_file(hyperv.Writer(long_bytes=20).write(tree))
    yield "xml", packed_file(hyperv.as_xml(tree))
    yield "xml-utf-8", packed_file(hyperv.as_xml(tree, encoding="utf-8", mark=b""))


def corpus() -> dict[str, dict[str, bytes]]:
    """Every seed, by target and name."""
    return {
        "fuzz_open": dict(open_seeds()),
        "fuzz_chain": dict(chain_seeds()),
        "fuzz_hyperv": dict(hyperv_seeds()),
        "fuzz_merge": dict(merge_seeds()),
        "fuzz_nbd": dict(nbd_seeds()),
        "fuzz_switch": dict(switch_seeds()),
        "fuzz_vhdx_open": seeds_vhdx.open_seeds(),
        "fuzz_vhdx_tables": seeds_vhdx.table_seeds(),
    }


def main() -> None:
    """Write the corpus. What else lies there is left alone."""
    for target, inputs in corpus().items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            assert len(data) <= MAX_SEED_BYTES, (target, name, len(data))
            (CORPUS / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
