"""What is kept on disk: checkpoints, trained base models, what is made of them, and the records of numbers."""
