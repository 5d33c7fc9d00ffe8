"""TensorRT plugins of deploycc."""
