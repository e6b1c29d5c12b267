"""What a trained model can do: embeddings, zero-shot classification, retrieval, a linear probe."""
