"""Backends turn a lowered artefact into an engine."""
