"""Graph passes: one file each, none imports another. They are found by entry point (group ``deploycc.passes``)."""
