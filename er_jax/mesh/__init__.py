"""Several devices: sharding rules (`rules`, `layout`), the engine on a mesh (`engine`,
`moves`, `attention`, `experts`), a batch on it (`topology`), several processes
(`processes`, `prompts`), and independent replicas (`replicas`).

Code for one device needs none of this.
"""

from er_jax.mesh.layout import rollout_mesh
from er_jax.mesh.rules import MeshAxes

__all__ = ["MeshAxes", "rollout_mesh"]
