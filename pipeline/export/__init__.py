"""Files for other programs: weights with model cards, embeddings, packed images."""
