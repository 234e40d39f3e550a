# SPDX-License-Identifier: Apache-2.0
"""Examines a whole chain: each of its files, and whether they belong together.

Decides what can be wrong between a child and its parent. What can be wrong inside a file is decided by its format.
"""

from __future__ import annotations

import os

from vhdkit import errors
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names import lineage
from vhdkit.chain.names.children import mark_findings
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import (
    allowed_folders,
    find_parent,
    leads_to,
    other_sectors,
    parent_format,
    parent_of,
    require_parent,
)
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.sharing import sharing_findings
from vhdkit.errors import CorruptReason
from vhdkit.finding import Finding, Severity, left_by_repair
from vhdkit.formats.format import Format
from vhdkit.formats.probe import format_of
from vhdkit.image import ImageFacts
from vhdkit.local_volume import LOCAL
from vhdkit.named import opened_again
from vhdkit.store import Store
from vhdkit.volume import Volume, VolumeFile


@checked
def check(path: AnyPath, *, options: OpenOptions | None = None, progress: Progress | None = None) -> list[Finding]:
    """Examine an image and all its parents, leaf first; an empty list means that nothing was found.

    The total passed to `progress` grows with each layer, because parents are found on the way.
    Raises NotFound, AccessDenied, InvalidArgument, UnsupportedFormat, ImageInUse and IoFailed; any damage
    to the images is a finding. Nothing is changed.
    """
    return check_on(LOCAL, os.fsdecode(path), options or OpenOptions(), progress)


def check_on(volume: Volume, leaf: str, options: OpenOptions, progress: Progress | None = None) -> list[Finding]:
    """`check` for a chain on any volume."""
    return opened_again(lambda: _checked(volume, leaf, options, progress))


def _checked(volume: Volume, leaf_path: str, options: OpenOptions, progress: Progress | None) -> list[Finding]:
    folders = allowed_folders(leaf_path, options.parent_dirs, volume)
    findings: list[Finding] = []
    examined_bytes = 0
    stores = [volume.open(leaf_path)]
    image_format: Format | None = None
    try:
        if options.lock:
            stores[0].lock(writer=False)
        findings += mark_findings(stores[0], options, volume)
        while True:
            store = stores[-1]
            seen = pending.look(store, volume)
            findings += seen.findings
            facts = _check_one(seen.store, findings, options, image_format, _after(progress, examined_bytes))
            if facts is None or facts.parent is None:
                return findings
            examined_bytes += facts.size_bytes
            parent = _parent_of(facts, folders, options, findings, volume)
            if parent is None:
                return findings
            stores.append(parent)
            image_format = parent_format(facts)
            if _closes_loop(stores, facts, findings):
                return findings
            if options.lock:
                parent.lock(writer=False)
            require_parent(facts, pending.view(parent, volume))
            _check_link(facts, parent, folders, findings, volume)
            findings += lineage.findings_about(store, facts, parent, volume)
    finally:
        for store in stores:
            store.close()


def _after(progress: Progress | None, before_bytes: int) -> Progress | None:
    """Convert one layer's progress to that of all layers so far."""
    return None if progress is None else lambda done, total: progress(before_bytes + done, before_bytes + total)


def _check_one(
    image: Store,
    findings: list[Finding],
    options: OpenOptions,
    image_format: Format | None,
    progress: Progress | None,
) -> ImageFacts | None:
    """Examine one file, as it must be read; returns its metadata if it is sound enough to have a parent.

    `image_format` is the format recorded by its child, None for the leaf.
    """
    try:
        image_format = image_format or format_of(image, options.format_name)
    except errors.CorruptImage as error:
        findings.append(_finding(error, error.reason.value, image.name))
        return None
    findings += image_format.check(image, ignore_bitmaps=options.ignore_bitmaps, progress=progress)
    findings += sharing_findings(image, image_format)
    try:
        return image_format.facts(image)
    except (errors.CorruptImage, errors.InvalidArgument):
        return None  # the examination has reported it


def _parent_of(
    child: ImageFacts, folders: tuple[str, ...], options: OpenOptions, findings: list[Finding], volume: Volume
) -> VolumeFile | None:
    codes = {
        errors.ParentMissing: "parent-missing",
        errors.ParentMismatch: "parent-mismatch",
        errors.ParentRefused: "parent-refused",
    }
    try:
        return find_parent(child, folders, options, volume)
    except errors.ParentError as error:
        findings.append(_finding(error, codes[type(error)], child.path))
        return None


def _finding(error: errors.VhdkitError, code: str, path: str) -> Finding:
    message = (
        error.problem + errors.difference(error.expected, error.found) + (f"; {error.hint}" if error.hint else "")
    )
    return Finding(Severity.ERROR, code, message, path, error.structure, error.offset_bytes)


def _closes_loop(stores: list[VolumeFile], child: ImageFacts, findings: list[Finding]) -> bool:
    if stores[-1].identity in [store.identity for store in stores[:-1]]:
        reason, message = CorruptReason.CHAIN_LOOP, "the chain of parents is circular"
    elif len(stores) > MAX_CHAIN_DEPTH:
        reason, message = CorruptReason.CHAIN_DEPTH, f"the chain has more than {MAX_CHAIN_DEPTH} layers"
    else:
        return False
    findings.append(Finding(Severity.ERROR, reason.value, message, child.path))
    return True


def _check_link(
    child: ImageFacts, store: VolumeFile, folders: tuple[str, ...], findings: list[Finding], volume: Volume
) -> None:
    """Differences between a child and its parent that leave them parent and child."""
    if not leads_to(child, store.name, folders, volume):
        message = (
            f"its parent {errors.printable(store.name)} was found by its bare name; no locator leads there, so other"
            " programs may not find it (`vhdkit check --repair` or `vhdkit rebase` rewrites the names)"
        )
        findings.append(Finding(Severity.WARNING, "parent-names", message, child.path))
    if parent_of(child).raw_allowed:
        return  # a raw file does not record the size of its disk
    try:
        parent = parent_format(child).facts(pending.view(store, volume))
    except (errors.CorruptImage, errors.InvalidArgument):
        return
    different = other_sectors(child, parent)
    if different is not None:
        findings.append(_finding(different, different.reason.value, child.path))
    if child.size_bytes != parent.size_bytes:
        severity = Severity.NOTE if child.size_bytes > parent.size_bytes else Severity.WARNING
        message = f"the disk has {child.size_bytes} bytes, that of its parent {parent.size_bytes}"
        if severity is Severity.WARNING:
            message = left_by_repair(
                message,
                "it resizes no disk; `vhdkit resize` makes it as large as its parent, unless old data would appear",
            )
        findings.append(Finding(severity, "chain-size", message, child.path))
