"""Content-addressed artifacts and the tiers that hold them."""
