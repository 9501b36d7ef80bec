"""Models in and out of other programs' formats."""
