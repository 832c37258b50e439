"""What the stages train on: the world of shapes, folders of pictures, cached embeddings."""
