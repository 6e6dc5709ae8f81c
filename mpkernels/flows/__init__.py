"""Normalizing flows: transforms with log|det J| from the same pass, inverses, and what flows are built of."""
