"""The command `island`: words in, text or JSON out, exit codes.

One file for each verb, named like it, holds its options and the text that a person reads. `main.py` is the
group of verbs, `help.py` how help is laid out, `options.py` what several verbs share, `run.py` one run of the
command with its answer, errors and notes. What a verb does is in `operations/`, reached through
`api.Repository`.

Imports: anything below; nothing heavy (numpy, rich, swiftclient) before a verb needs it. Imported by
`__main__` and the bench's tables.
"""
