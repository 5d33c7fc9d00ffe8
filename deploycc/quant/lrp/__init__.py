"""Layer-wise relevance propagation over any ONNX graph: the only analyses that need gradients, and so the only ones in torch.

``operators`` and its neighbours execute nodes, ``tape`` records a batch and walks it backwards, ``rules`` say how relevance passes
each operator, ``targets`` where it starts. Import this package where it is used: it imports torch.
"""
