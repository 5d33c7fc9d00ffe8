"""deploycc compiles vision models to TensorRT engines whose precision is chosen layer by layer, with the evidence."""

__version__ = "0.1.0"
