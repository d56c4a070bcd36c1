"""Scripts that measure the library, and the figures that they have measured.

Each script is run as a module from the root of the project (for instance `python -m
benchmarks.steps`), prints what it finds and writes a JSON record into `results/`.
`README.md` beside this file lists the scripts, what each claims and under which
conditions, and has the tables of all records. `lib/` holds modules that scripts use.
"""
