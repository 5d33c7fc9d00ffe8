"""Measurements of what was built. They measure and repair nothing."""
