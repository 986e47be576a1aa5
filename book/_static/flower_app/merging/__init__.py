"""A Flower app whose server merges what its clients have trained."""
