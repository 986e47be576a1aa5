"""Running cells: what one is, in what order, and where."""
