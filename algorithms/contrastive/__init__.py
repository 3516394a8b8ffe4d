"""Contrastive learning: embeddings that cross ranks inside the gradient."""
