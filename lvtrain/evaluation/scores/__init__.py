"""What scores say: figures from embeddings, cosines and labels, without files or networks."""
