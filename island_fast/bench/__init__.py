"""Measure how fast island is, compared with the tools that people would use instead.

`python -m island_fast.bench` is the command line (`__main__`); it is no part of the command `island`.

    case       one thing to measure; `cases/` has all of them, `cases/all_cases.py` lists them in their order
    row        times or rates of island and of a peer, measured in pairs on the same data, and their ratio
    counter    something counted, which is the same on every machine
    peer       a tool that island is compared with; `peers/` runs them
    report     the rows and counters of one run, with the machine and the versions
    baseline   an earlier report, which `--compare` compares with

`runner` runs the cases, `timing` measures processes, `slow_link` delays what goes to a store, `table` and
`plot` show a report, `compare` compares two. `volume`, `synthetic_volume` and `synthetic_image` make the
data. The bench imports any other room, and no other room imports it.
"""
