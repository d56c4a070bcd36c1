"""What the library costs and saves, one script per claim.

Each script is run as a module from the root of the project, prints what it measures,
and writes a JSON record and a plot. `README.md` beside this file holds the claims,
their conditions and the settings that lose.

* `steps`: a pass over the weights at a time, by rows and cache length.
* `rollout`: whole rollouts, by control and by how long completions are.
* `accelerator`: both for a 7B-shaped policy, on a machine with a GPU or a TPU.

The rest is shared: `measure` (timing, records), `passes` (the programs that are timed
and the bytes they must read), `presets` (decoders), `workloads` (planned lengths, the
static batch).
"""
