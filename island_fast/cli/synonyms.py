"""What other programs call the things that a verb of ours does, for those who try their word first."""

from __future__ import annotations

__all__ = ["SYNONYMS"]

SYNONYMS = {
    word: answer
    for words, answer in {
        "backup create save take": "'island snapshot' takes a snapshot",
        "ls snapshots": "'island list' lists snapshots",
        "rm remove": "'island delete' deletes snapshots",
        "forget": "'island retain' deletes the snapshots that no rule keeps",
        "prune gc compact vacuum": "'island sweep' frees the space of deleted snapshots",
        "check fsck scrub": "'island verify' verifies what is stored",
        "protect hold lock": "'island keep' marks snapshots that must not be deleted",
        "repair": "'island verify --all --heal' repairs what is damaged",
        "mount": "'island restore' writes a snapshot to a file, which can be mounted",
        "extract": "'island restore' writes a snapshot to a file",
        "stats du": "'island usage' shows what snapshots hold and use",
        "sync": "'island copy' copies snapshots to another repository",
        "init": "the first 'island snapshot' creates the repository",
        "help": "run 'island --help'",
        "version": "run 'island --version'",
    }.items()
    for word in words.split()
}
"""What to answer to a word that is no verb."""
