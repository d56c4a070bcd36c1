"""Many devices: where arrays lie (`rules`, `layout`), the engine over them (`engine`,
`moves`, `attention`), a batch on them (`topology`), several processes (`processes`,
`prompts`), and rollouts that sample apart (`replicas`).

Whoever reads for one device needs none of this.
"""

from er_jax.mesh.layout import rollout_mesh
from er_jax.mesh.rules import MeshAxes

__all__ = ["MeshAxes", "rollout_mesh"]
