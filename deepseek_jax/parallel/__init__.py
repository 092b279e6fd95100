"""Meshes, sharding rules and expert dispatch: where arrays live. Knows nothing of what a layer computes."""
