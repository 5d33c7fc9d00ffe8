"""Findings about the Q/DQ of anybody's ONNX file: one small function per rule, one file per family of rules."""
