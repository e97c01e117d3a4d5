"""What is right: the layer computed plainly, and how far a result may be off."""
