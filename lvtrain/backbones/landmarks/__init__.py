"""The parts of Part fViT that find landmarks and cut patches around them."""
