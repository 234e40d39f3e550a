# SPDX-License-Identifier: Apache-2.0
"""Backup repositories: what programs that use vhdkit as a library may call, vmm among them.

    from vhdkit import backups

    with backups.open_repository("/srv/backup") as repository:
        print(repository.machine_ids())

Decides which names of the room `backup` are public; each is imported when it is first used. Must not know what they
do.
"""

TYPE_CHECKING = False  # as in `vhdkit`: type checkers know the name
if TYPE_CHECKING:
    from vhdkit.backup.choosing import Wanted, chosen
    from vhdkit.backup.clock import zone_here
    from vhdkit.backup.copying import Copied, CopiedMachine, copy_repository, promote_copy
    from vhdkit.backup.documents import DamagedRepository, time_word
    from vhdkit.backup.graph import Images
    from vhdkit.backup.keep import DatedNight, KeepRules, out_of_order, zone_named
    from vhdkit.backup.known import UnexpectedRepository, open_known
    from vhdkit.backup.leases import NightLease, add_lease, leased_nights, leases, release
    from vhdkit.backup.manifest import BaseRecord, Consistency, DiskRecord, FileRecord, How, Manifest
    from vhdkit.backup.names import is_machine_name, is_name
    from vhdkit.backup.night import Circumstances, FrozenDisk, Stages, Wishes, Writing, writing
    from vhdkit.backup.protection import protect
    from vhdkit.backup.pruning import Pruned, dated_nights, delete, finish_interrupted, prune
    from vhdkit.backup.reports import (
        DamageReport,
        DiskReport,
        ImagesMerged,
        LeaseReport,
        MachineReport,
        NightDetails,
        NightFound,
        NightPair,
        NightReport,
        PruneReport,
        SavedStatus,
        VerifyReport,
        find_night,
        nights_out_of_order,
        report_machines,
        report_night,
        report_nights,
        report_prune,
        report_status,
        report_verification,
    )
    from vhdkit.backup.reports_of_all import report_statuses, report_verifications
    from vhdkit.backup.repository import MachineFolder, Night, Repository, create_repository, open_repository
    from vhdkit.backup.restore import Restored, check_disk, copy_file, read_file, restore
    from vhdkit.backup.standing import StandingImage, mark_as_night, size_without_parents, stand_on_night
    from vhdkit.backup.verify import NightResult, Verification, known_results, verify
    from vhdkit.chain.records.references import NightMark, forget_marks, marks_at
    from vhdkit.rate import RateLimit

__all__ = [
    "BaseRecord",
    "Circumstances",
    "Consistency",
    "Copied",
    "CopiedMachine",
    "DamageReport",
    "DamagedRepository",
    "DatedNight",
    "DiskRecord",
    "DiskReport",
    "FileRecord",
    "FrozenDisk",
    "How",
    "Images",
    "ImagesMerged",
    "KeepRules",
    "LeaseReport",
    "MachineFolder",
    "MachineReport",
    "Manifest",
    "Night",
    "NightDetails",
    "NightFound",
    "NightLease",
    "NightMark",
    "NightPair",
    "NightReport",
    "NightResult",
    "PruneReport",
    "Pruned",
    "RateLimit",
    "Repository",
    "Restored",
    "SavedStatus",
    "Stages",
    "StandingImage",
    "UnexpectedRepository",
    "Verification",
    "VerifyReport",
    "Wanted",
    "Wishes",
    "Writing",
    "add_lease",
    "check_disk",
    "chosen",
    "copy_file",
    "copy_repository",
    "create_repository",
    "dated_nights",
    "delete",
    "find_night",
    "finish_interrupted",
    "forget_marks",
    "is_machine_name",
    "is_name",
    "known_results",
    "leased_nights",
    "leases",
    "mark_as_night",
    "marks_at",
    "nights_out_of_order",
    "open_known",
    "open_repository",
    "out_of_order",
    "promote_copy",
    "protect",
    "prune",
    "read_file",
    "release",
    "report_machines",
    "report_night",
    "report_nights",
    "report_prune",
    "report_status",
    "report_statuses",
    "report_verification",
    "report_verifications",
    "restore",
    "size_without_parents",
    "stand_on_night",
    "time_word",
    "verify",
    "writing",
    "zone_here",
    "zone_named",
]

# Where each name lives, for the first use of it.
_HOMES = {
    "vhdkit.backup.choosing": "Wanted chosen",
    "vhdkit.backup.clock": "zone_here",
    "vhdkit.backup.copying": "Copied CopiedMachine copy_repository promote_copy",
    "vhdkit.backup.documents": "DamagedRepository time_word",
    "vhdkit.backup.graph": "Images",
    "vhdkit.backup.keep": "DatedNight KeepRules out_of_order zone_named",
    "vhdkit.backup.known": "UnexpectedRepository open_known",
    "vhdkit.backup.leases": "NightLease add_lease leased_nights leases release",
    "vhdkit.backup.manifest": "BaseRecord Consistency DiskRecord FileRecord How Manifest",
    "vhdkit.backup.names": "is_machine_name is_name",
    "vhdkit.backup.night": "Circumstances FrozenDisk Stages Wishes Writing writing",
    "vhdkit.backup.protection": "protect",
    "vhdkit.backup.pruning": "Pruned dated_nights delete finish_interrupted prune",
    "vhdkit.backup.reports": (
        "DamageReport DiskReport ImagesMerged LeaseReport MachineReport NightDetails NightFound NightPair NightReport "
        "PruneReport SavedStatus VerifyReport find_night nights_out_of_order report_machines report_night "
        "report_nights report_prune report_status report_verification"
    ),
    "vhdkit.backup.reports_of_all": "report_statuses report_verifications",
    "vhdkit.backup.repository": "MachineFolder Night Repository create_repository open_repository",
    "vhdkit.backup.restore": "Restored check_disk copy_file read_file restore",
    "vhdkit.backup.standing": "StandingImage mark_as_night size_without_parents stand_on_night",
    "vhdkit.backup.verify": "NightResult Verification known_results verify",
    "vhdkit.chain.records.references": "NightMark forget_marks marks_at",
    "vhdkit.rate": "RateLimit",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

if not TYPE_CHECKING:  # type checkers use the imports above, and refuse missing names

    def __getattr__(name: str) -> object:
        from importlib import import_module

        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module 'vhdkit.backups' has no attribute {name!r}")
        value = getattr(import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
