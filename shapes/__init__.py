"""The embedded world: captioned procedural scenes, an exact oracle, and the pretraining of the tiny models."""
