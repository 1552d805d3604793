"""The command `island`: words in, text or JSON out, exit codes.

One file for each verb or family of verbs, named like it, holds its options and what a person reads; `main.py`
is the group, `options.py` what several verbs share, `run.py` one run of the command with its errors and
notes. What a verb does is in `operations/`, reached through `api.Repository` alone.

Imports: anything below; nothing heavy (numpy, rich, swiftclient) before a verb needs it. Imported by
`__main__` and the bench's tables.
"""
