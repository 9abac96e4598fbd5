"""Only scalars broadcast without being told to: an accidental [B] against [B, B] is an error, not a wrong number."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
