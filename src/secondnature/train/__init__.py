"""The room of the trainer (heavy; import the modules): `step` reads top to bottom."""
