"""What breaks npmerge, and what does not: kills, flipped bits, troubled machines, fuzzers."""
